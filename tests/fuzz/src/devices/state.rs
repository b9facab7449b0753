//! Devices and the interrupt controller as they were saved, or as somebody says that they were: restored, and driven on.
//!
//! What is restored must be what a driver can bring a device to. So each state is come to a second time, register by
//! register, and the two ways must agree.

use super::{fs, net, reader, vsock};
use crate::driver::{Driver, Host, Nobody, Rings, Routes, address};
use crate::input::Input;
use crate::ram::{REGIONS, Ram};
use husk_vmm::bus::Bus;
use husk_vmm::irq::ioapic::{self, IoApic};
use husk_vmm::layout;
use husk_vmm::memory::Memory;
use husk_vmm::virtio::console::Console;
use husk_vmm::virtio::device::{Device, Interrupt};
use husk_vmm::virtio::fs::Fs;
use husk_vmm::virtio::mmio::{self, Transport, register as reg};
use husk_vmm::virtio::net::Net;
use husk_vmm::virtio::rng::Rng;
use husk_vmm::virtio::vsock::Vsock;
use husk_vmm::worker::inline;
use serde_json::{Value, from_value, json, to_value};
use std::cell::RefCell;
use std::sync::Arc;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const RUNNING: u32 = 0xf;
const NEEDS_RESET: u32 = 0x40;
const FAILED: u32 = 0x80;
const VERSION_1: u64 = 1 << 32;

/// Bits of an IOAPIC's entry that can be set, and the one that masks its pin.
const ENTRY: u64 = 0xff00_0000_0001_afff;
const MASKED: u64 = 1 << 16;

/// Queues, as a driver keeps them whose device is active.
#[derive(Default)]
struct Plan {
    queues: Vec<Rings>,
    /// What was saved is as the driver left it.
    honest: bool,
}

/// A saved device of a kind.
fn device_state(kind: usize, input: &mut Input<'_>) -> Value {
    // Mostly one that there can be.
    let odd = input.u8();
    let number = |input: &mut Input<'_>, usual: u64| if odd & 0x1f == 0x1f { input.number() } else { usual };
    match kind {
        0 => json!({}),
        1 => json!({
            "lost": if odd & 0x20 == 0 { 0 } else { input.number() },
            "line_start": odd & 0x40 == 0,
            "panic_seen": number(input, u64::from(odd & 0xf)),
        }),
        2 | 3 => json!({
            "mac": [number(input, 2), 0, 0, 0, 0, 1],
            "queue_pairs": number(input, kind as u64 - 1),
            "active_pairs": number(input, if odd & 0x20 == 0 { 1 } else { kind as u64 - 1 }),
        }),
        4 => json!({ "guest_cid": number(input, 3), "transport_reset": odd & 0x40 == 0 }),
        _ => json!({ "tag": match odd {
            0xff => String::from_utf8_lossy(input.text(64)).into_owned(),
            _ => "share".to_owned(),
        }}),
    }
}

/// The device with this state, if there can be one, and what is behind it. It has to know what it was told.
fn device(kind: usize, state: &Value) -> Option<(Box<dyn Device>, Box<dyn Host>)> {
    let state = state.clone();
    match kind {
        0 => {
            let device = Rng::restore(from_value(state).ok()?).ok()?;
            Some((Box::new(device), Box::new(Nobody)))
        }
        1 => {
            let state: husk_vmm::virtio::console::State = from_value(state).ok()?;
            let (output, reader) = reader();
            let device = Console::restore(state.clone(), output, Arc::default()).ok()?;
            assert_eq!(device.save(), state);
            Some((Box::new(device), Box::new(reader)))
        }
        2 | 3 => {
            let state: husk_vmm::virtio::net::State = from_value(state).ok()?;
            let (taps, network) = net::network(kind - 1);
            let device = Net::restore("net", &state, taps).ok()?;
            assert_eq!(device.save(), state);
            Some((Box::new(device), Box::new(network)))
        }
        4 => {
            let state: husk_vmm::virtio::vsock::State = from_value(state).ok()?;
            let (offers, engine) = vsock::engine(state.guest_cid);
            let device = Vsock::restore(state.clone(), offers).ok()?;
            assert_eq!(device.save(), state);
            Some((Box::new(device), Box::new(engine)))
        }
        _ => {
            let state: husk_vmm::virtio::fs::State = from_value(state).ok()?;
            let (channel, server) = fs::server();
            let device = Fs::restore(state.clone(), channel).ok()?;
            assert_eq!(device.save(), state);
            Some((Box::new(device), Box::new(server)))
        }
    }
}

/// Saved registers in front of the device: such as a driver leaves behind, and then what the input makes of them.
fn transport_state(device: &dyn Device, ram: &Ram, input: &mut Input<'_>) -> (Value, Plan) {
    let how = input.u8();
    let status = match how & 7 {
        0..=5 => RUNNING,
        6 => input.one_of(&[0, 1, 3, 0xb]),
        _ => {
            input.one_of(&[0, 1, 3, 0xb, RUNNING])
                | input.one_of(&[FAILED, NEEDS_RESET, FAILED | NEEDS_RESET])
        }
    };
    let offered = device.features() | VERSION_1;
    let mut features = match (status & 0xf, how >> 3 & 1) {
        (0 | 1, _) => 0,
        (_, 0) => offered,
        _ => offered & (input.u64() | VERSION_1),
    };
    let mut plan = Plan {
        queues: vec![],
        honest: status == RUNNING,
    };
    let mut queues = vec![];
    for (number, most) in (0u32..).zip(device.queue_max_sizes()) {
        let choice = if how & 0x10 == 0 { 0 } else { input.u8() };
        let ready = status & 8 != 0 && choice & 0x80 == 0;
        let size = match choice & 0xf {
            0 => 32.min(*most),
            bits => 1u16.checked_shl(u32::from(bits) - 1).unwrap_or(1).min(*most),
        };
        let mut rings = Rings::new(number, if ready { size } else { 0 });
        if ready {
            let position = if how & 0x20 == 0 { 0 } else { input.number() as u16 };
            rings.stand_at(ram, position);
            let [descriptors, available, used] = rings.places();
            queues.push(json!({
                "size": size, "ready": true, "descriptors": descriptors, "available": available, "used": used,
            }));
        } else {
            queues.push(json!({ "size": most, "ready": false, "descriptors": 0, "available": 0, "used": 0 }));
        }
        plan.queues.push(rings);
    }
    let mut state = json!({
        "status": status,
        "device_features_select": 1,
        "driver_features_select": 1,
        "queue_select": queues.len() - 1,
        "interrupt_status": if status & RUNNING == RUNNING { how >> 6 } else { 0 },
        "generation": 0,
    });
    for _ in 0..input.below(4) {
        plan.honest = false;
        let queue = input.below(queues.len());
        match input.below(10) {
            0 => state["status"] = input.number().into(),
            1 => features ^= 1 << (input.u8() & 63),
            2 => features = input.u64(),
            3 => {
                let field = input.one_of(&["descriptors", "available", "used"]);
                queues[queue][field] = address(input).into();
            }
            4 => queues[queue]["size"] = input.number().into(),
            5 => queues[queue]["ready"] = (input.u8() & 1 == 0).into(),
            6 => state["interrupt_status"] = input.number().into(),
            7 => {
                let field = input.one_of(&[
                    "device_features_select",
                    "driver_features_select",
                    "queue_select",
                    "generation",
                ]);
                state[field] = input.number().into();
            }
            8 => queues.truncate(input.below(3).max(1)),
            _ => queues.push(queues[queue].clone()),
        }
    }
    state["driver_features"] = features.into();
    state["queues"] = queues.into();
    (state, plan)
}

/// A saved IOAPIC.
fn io_apic_state(input: &mut Input<'_>) -> Value {
    let mut entries = [MASKED; layout::IOAPIC_PINS];
    let how = input.u8();
    for _ in 0..how & 3 {
        let mask = if how & 0x1c == 0x1c { u64::MAX } else { ENTRY };
        entries[input.below(layout::IOAPIC_PINS)] = input.u64() & mask;
    }
    json!({ "select": how, "id": how >> 5, "entries": entries })
}

fn line() -> Interrupt {
    Interrupt::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).expect("descriptors"))
}

/// Memory like the guest's, in which there is nothing.
fn other_memory() -> Memory {
    thread_local! {
        static MEMORY: RefCell<Option<Memory>> = const { RefCell::new(None) };
    }
    MEMORY.with_borrow_mut(|memory| {
        let ranges = REGIONS.map(|(start, length)| (GuestAddress(start), length));
        let new = || Memory::from_ranges(&ranges).expect("less than a megabyte");
        memory.get_or_insert_with(new).clone()
    })
}

/// Whether a driver can come to this state, which it tries in front of such a device.
fn can_be_come_to(state: &mmio::State, device: Box<dyn Device>) -> bool {
    let wanted = to_value(state).expect("it can be saved");
    let field = |name: &str| wanted[name].as_u64().expect("a number");
    let status = field("status") as u32;
    let bits = field("interrupt_status");
    if bits > 3 || (bits != 0 && status & RUNNING != RUNNING) {
        return false;
    }
    let mut transport = Transport::new(device, other_memory(), line()).expect("descriptors");
    let mut set = |register: u64, value: u64| transport.write(register, &(value as u32).to_le_bytes());
    let halves = |number: u64| [number & 0xffff_ffff, number >> 32];
    for step in [1, 3].into_iter().filter(|step| status & step == *step) {
        set(reg::STATUS, u64::from(step));
    }
    for (word, half) in (0..).zip(halves(field("driver_features"))) {
        set(reg::DRIVER_FEATURES_SEL, word);
        set(reg::DRIVER_FEATURES, half);
    }
    if status & 0xb == 0xb {
        set(reg::STATUS, 0xb);
    }
    for (number, queue) in (0..).zip(wanted["queues"].as_array().expect("a list")) {
        set(reg::QUEUE_SEL, number);
        set(reg::QUEUE_NUM, queue["size"].as_u64().expect("a number"));
        for (name, register) in [
            ("descriptors", reg::QUEUE_DESC_LOW),
            ("available", reg::QUEUE_DRIVER_LOW),
            ("used", reg::QUEUE_DEVICE_LOW),
        ] {
            let [low, high] = halves(queue[name].as_u64().expect("a number"));
            set(register, low);
            set(register + 4, high);
        }
        set(reg::QUEUE_READY, u64::from(queue["ready"] == true));
    }
    if status & RUNNING == RUNNING {
        set(reg::STATUS, u64::from(RUNNING));
    }
    if status & FAILED != 0 {
        set(reg::STATUS, u64::from(FAILED | RUNNING));
    }
    set(reg::QUEUE_SEL, field("queue_select"));
    set(reg::DEVICE_FEATURES_SEL, field("device_features_select"));
    set(reg::DRIVER_FEATURES_SEL, field("driver_features_select"));
    let mut found = to_value(transport.save()).expect("it can be saved");
    for field in ["interrupt_status", "generation"] {
        found[field] = wanted[field].clone();
    }
    // The host may have been at fault.
    if status & (NEEDS_RESET | RUNNING) == NEEDS_RESET | RUNNING {
        let status = found["status"].as_u64().expect("a number");
        found["status"] = (status | u64::from(NEEDS_RESET)).into();
    }
    found == wanted
}

/// A device of any kind behind its transport, and an IOAPIC.
pub fn state(bytes: &[u8]) {
    inline::enter();
    let mut input = Input::new(bytes);
    let ram = Ram::new();
    let how = input.u8();
    let kind = usize::from(how & 7) % 6;
    // As text, or as the input's numbers make it.
    let mut text: Value = match how >> 3 {
        0x1f => serde_json::from_slice(input.text(0x400)).unwrap_or_default(),
        _ => Value::Null,
    };
    let mut part = |name: &str| text.get_mut(name).map(Value::take);
    let device_state = part("device").unwrap_or_else(|| device_state(kind, &mut input));
    let Some((restored, mut host)) = device(kind, &device_state) else {
        return;
    };
    let (saved, plan) = match part("transport") {
        Some(saved) => (saved, Plan::default()),
        None => transport_state(&*restored, &ram, &mut input),
    };
    let io_apic = part("io_apic").unwrap_or_else(|| io_apic_state(&mut input));
    let (Ok(saved), Ok(io_apic)) = (
        from_value::<mmio::State>(saved),
        from_value::<ioapic::State>(io_apic),
    ) else {
        return;
    };
    let mut plan = plan;
    for _ in 0..input.below(4) {
        plan.honest = false;
        let place = address(&mut input);
        ram.write(place, input.text(64));
    }

    let (second, others) = device(kind, &device_state).expect("there was one before");
    let possible = can_be_come_to(&saved, second);
    drop(others);
    let interrupt = line();
    let transport = Transport::restore(saved.clone(), restored, ram.memory.clone(), interrupt.clone());
    assert_eq!(
        transport.is_ok(),
        possible,
        "{saved:?}: {:?}",
        transport.as_ref().map(drop)
    );
    let Ok(transport) = transport else { return };
    assert_eq!(transport.save(), saved);

    let entries = to_value(&io_apic).expect("it can be saved");
    let numbers = entries["entries"].as_array().expect("a list").iter();
    let exist = numbers.filter_map(Value::as_u64).all(|entry| entry & !ENTRY == 0);
    let lines = vec![(layout::virtio_irq(0), interrupt)];
    let copy = IoApic::restore(io_apic.clone(), Box::new(Routes), lines);
    assert_eq!(copy.is_ok(), exist && entries["id"].as_u64() < Some(0x10));
    let Ok(copy) = copy else { return };
    assert_eq!(copy.save(), io_apic);

    let event_idx = to_value(&saved).expect("it can be saved")["driver_features"].as_u64();
    let event_idx = event_idx.is_some_and(|features| features & 1 << 29 != 0);
    let bus = Bus::new(Some(copy), vec![transport]);
    let mut driver = Driver::midway(&ram, bus, plan.queues, plan.honest, event_idx);
    driver.go_on(&mut input, &mut *host);
    drop(driver);
    ram.check();
}
