use containerd_shim_protos::bootstrap_api::Extension;
use proptest::prelude::*;
use protobuf::{EnumOrUnknown, well_known_types::any::Any};

use super::*;

const CONTAINERD_1_7: &[&str] = &[
    "-namespace",
    "default",
    "-address",
    "/run/containerd/containerd.sock",
    "-publish-binary",
    "/usr/bin/containerd",
    "-id",
    "t1",
    "-debug",
    "start",
];

fn started() -> Invocation {
    Invocation::parse(CONTAINERD_1_7).unwrap()
}

fn environment(name: &str) -> Option<String> {
    match name {
        "TTRPC_ADDRESS" => Some("/run/containerd/containerd.sock.ttrpc".into()),
        "GRPC_ADDRESS" => Some("/run/other.sock".into()),
        _ => None,
    }
}

#[test]
fn containerd_s_command_line_is_understood() {
    assert_eq!(
        started(),
        Invocation {
            action: Action::Start,
            namespace: "default".into(),
            id: "t1".into(),
            address: "/run/containerd/containerd.sock".into(),
            publish_binary: "/usr/bin/containerd".into(),
            bundle: None,
            socket: String::new(),
            debug: true,
        }
    );
}

#[test]
fn go_s_other_spellings_of_flags_are_understood() {
    let invocation = Invocation::parse(&[
        "--namespace=k8s.io",
        "-id=a=b",
        "--debug=false",
        "--",
        "delete",
        "-x",
    ]);
    assert_eq!(
        invocation.unwrap_err(),
        UsageError::InvalidId {
            flag: "id",
            value: "a=b".into()
        }
    );
    let invocation = Invocation::parse(&[
        "--namespace=k8s.io",
        "-id=ab",
        "-bundle=/b",
        "--debug=false",
        "--",
        "delete",
    ])
    .unwrap();
    assert_eq!(invocation.action, Action::Delete);
    assert_eq!(invocation.namespace, "k8s.io");
    assert_eq!(invocation.bundle, Some(PathBuf::from("/b")));
    assert!(!invocation.debug);
}

#[test]
fn without_an_action_it_serves() {
    let invocation = Invocation::parse(&["-namespace", "n", "-id", "i", "-socket", "/s"]).unwrap();
    assert_eq!(
        (invocation.action, invocation.socket.as_str()),
        (Action::Serve, "/s")
    );
}

#[test]
fn version_and_info_need_no_id() {
    assert_eq!(Invocation::parse(&["-v"]).unwrap().action, Action::Version);
    assert_eq!(Invocation::parse(&["-info"]).unwrap().action, Action::Info);
}

#[test]
fn what_containerd_never_sends_is_refused() {
    let refused = |args: &[&str]| Invocation::parse(args).unwrap_err();
    assert_eq!(refused(&["-nope"]), UsageError::UnknownFlag("nope".into()));
    assert_eq!(refused(&["-id"]), UsageError::MissingValue("id".into()));
    assert_eq!(
        refused(&["-namespace", "n", "-id", "i", "-debug=maybe"]),
        UsageError::NotBoolean {
            flag: "debug".into(),
            value: "maybe".into()
        }
    );
    assert_eq!(
        refused(&["-namespace", "n", "-id", "i", "stop"]),
        UsageError::UnknownAction("stop".into())
    );
    for id in ["", "..", "a/b", "../../etc"] {
        assert_eq!(
            refused(&["-namespace", "n", "-id", id, "start"]),
            UsageError::InvalidId {
                flag: "id",
                value: id.into()
            }
        );
        assert_eq!(
            refused(&["-namespace", id, "-id", "i", "delete"]),
            UsageError::InvalidId {
                flag: "namespace",
                value: id.into()
            }
        );
    }
}

#[test]
fn without_stdin_the_environment_tells() {
    let params = StartParams::resolve(&started(), environment, &[]).unwrap();
    assert_eq!(
        params,
        StartParams {
            ttrpc_address: "/run/containerd/containerd.sock.ttrpc".into(),
            grpc_address: "/run/containerd/containerd.sock".into(),
            socket_dir: None,
            debug: true,
            protobuf: false,
        }
    );
    let cri_o = Invocation {
        address: String::new(),
        ..started()
    };
    let params = StartParams::resolve(&cri_o, |_| None, &[]).unwrap();
    assert_eq!(
        (params.ttrpc_address.as_str(), params.grpc_address.as_str()),
        ("", "")
    );
}

#[test]
fn runtime_options_on_stdin_are_not_taken_for_the_bootstrap_message() {
    let options = Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: vec![0x0a, 1, b'x'],
        ..Any::default()
    };
    let params = StartParams::resolve(&started(), environment, &options.write_to_bytes().unwrap()).unwrap();
    assert!(!params.protobuf);
    assert_eq!(params.ttrpc_address, "/run/containerd/containerd.sock.ttrpc");
}

fn message() -> BootstrapParams {
    BootstrapParams {
        instance_id: "t1".into(),
        namespace: "default".into(),
        log_level: EnumOrUnknown::from_i32(-5),
        containerd_ttrpc_address: "/t".into(),
        containerd_grpc_address: "/g".into(),
        socket_dir: Some("/run/s".into()),
        extensions: vec![Extension::default()],
        ..BootstrapParams::default()
    }
}

#[test]
fn the_bootstrap_message_is_taken_as_it_is() {
    let quiet = Invocation {
        debug: false,
        ..started()
    };
    let params = StartParams::resolve(&quiet, environment, &message().write_to_bytes().unwrap()).unwrap();
    assert_eq!(
        params,
        StartParams {
            ttrpc_address: "/t".into(),
            grpc_address: "/g".into(),
            socket_dir: Some("/run/s".into()),
            debug: true,
            protobuf: true,
        }
    );
}

#[test]
fn another_container_s_bootstrap_message_is_refused() {
    let other = BootstrapParams {
        instance_id: "t2".into(),
        ..message()
    };
    let error = StartParams::resolve(&started(), environment, &other.write_to_bytes().unwrap()).unwrap_err();
    assert!(matches!(error, UsageError::OtherContainer { .. }), "{error}");
}

#[test]
fn the_answer_follows_containerd_s_version() {
    for (output, answer) in [
        (
            "containerd github.com/containerd/containerd v1.7.24 88bf19b\n",
            Answer::JsonV2,
        ),
        (
            "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+b1",
            Answer::JsonV2,
        ),
        ("containerd containerd.io 1.6.28 ae07eda", Answer::JsonV2),
        (
            "containerd github.com/containerd/containerd/v2 v2.1.9 abc",
            Answer::JsonV3,
        ),
        (
            "containerd github.com/containerd/containerd/v2 2.1.9~ds1 2.1.9~ds1-1",
            Answer::JsonV3,
        ),
        ("crio version 2.0.0", Answer::JsonV2),
        ("containerd", Answer::JsonV2),
        ("containerd x y.z", Answer::JsonV2),
        ("", Answer::JsonV2),
    ] {
        assert_eq!(Answer::for_version_output(output), answer, "{output:?}");
    }
}

#[test]
fn answers_are_what_containerd_decodes() {
    let address = "unix:///run/containerd/s/ab";
    let json: serde_json::Value = serde_json::from_slice(&Answer::JsonV2.encode(address)).unwrap();
    assert_eq!(
        json,
        serde_json::json!({ "version": 2, "address": address, "protocol": "ttrpc" })
    );
    let json: serde_json::Value = serde_json::from_slice(&Answer::JsonV3.encode(address)).unwrap();
    assert_eq!(json["version"], 3);
    let result = BootstrapResult::parse_from_bytes(&Answer::Protobuf.encode(address)).unwrap();
    assert_eq!((result.version, result.address.as_str()), (3, address));
    // 2.3 and later try protobuf first: JSON must not decode as it.
    BootstrapResult::parse_from_bytes(&Answer::JsonV3.encode(address)).unwrap_err();
}

proptest! {
    #[test]
    fn no_arguments_and_no_stdin_make_it_panic(
        args in proptest::collection::vec("(-{0,2}(id|namespace|debug|info|v|x)?=?[a-z/.]{0,4}|start|delete)", 0..8),
        stdin in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let _ = Invocation::parse(&args);
        let _ = StartParams::resolve(&started(), environment, &stdin);
    }
}
