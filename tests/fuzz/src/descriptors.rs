//! Packet sockets, pipes, and descriptors sent over them.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Both ends of a packet socket; neither waits.
pub fn packet_pair() -> (OwnedFd, OwnedFd) {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: `fds` has room for two descriptors, which are nobody else's.
    unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

/// Both ends of a pipe, for reading and for writing; neither waits.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [-1; 2];
    // SAFETY: as above.
    unsafe {
        assert_eq!(
            libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK),
            0
        );
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

/// Sends a packet with up to ten descriptors, if the other end takes it.
pub fn send(socket: &OwnedFd, packet: &[u8], attached: &[BorrowedFd<'_>]) {
    #[repr(C, align(8))]
    struct Control([u8; 64]);
    let attached = &attached[..attached.len().min(10)];
    let mut control = Control([0; 64]);
    let mut data = libc::iovec {
        iov_base: packet.as_ptr().cast_mut().cast(),
        iov_len: packet.len(),
    };
    // SAFETY: all fields of msghdr are plain numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut data;
    message.msg_iovlen = 1;
    let length = (attached.len() * 4) as libc::c_uint;
    // SAFETY: `control` has room for the header and ten descriptors; `message` and all that it points to live through
    // the call.
    unsafe {
        if !attached.is_empty() {
            message.msg_control = (&raw mut control).cast();
            message.msg_controllen = libc::CMSG_SPACE(length) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as usize;
            let place = libc::CMSG_DATA(header).cast::<i32>();
            for (index, fd) in attached.iter().enumerate() {
                place.add(index).write_unaligned(fd.as_raw_fd());
            }
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        libc::sendmsg(socket.as_raw_fd(), &raw const message, flags);
    }
}

/// Receives a packet, cut to the buffer's length; `None` if there is none.
pub fn receive(socket: &OwnedFd, into: &mut [u8]) -> Option<usize> {
    // SAFETY: `into` has room for the length given and lives through the call.
    let length = unsafe {
        libc::recv(
            socket.as_raw_fd(),
            into.as_mut_ptr().cast(),
            into.len(),
            libc::MSG_DONTWAIT,
        )
    };
    usize::try_from(length).ok()
}

/// A new file in memory.
pub fn memory_file() -> OwnedFd {
    // SAFETY: the name is a string with its NUL, and a new descriptor is nobody else's.
    unsafe {
        let fd = libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}
