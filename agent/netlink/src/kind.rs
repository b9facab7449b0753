//! Kinds of messages and attributes: the kernel's numbers (`linux/rtnetlink.h`, `if_link.h`, `fib_rules.h`,
//! `pkt_sched.h`), of which the C library's headers have only some.

/// Length of `struct ifinfomsg`.
pub const LINK_HEADER: usize = 16;
/// Length of `struct ifaddrmsg`.
pub const ADDRESS_HEADER: usize = 8;
/// Length of `struct rtmsg`, and of `struct fib_rule_hdr`, which begins alike.
pub const ROUTE_HEADER: usize = 12;
/// Length of `struct ndmsg`.
pub const NEIGHBOUR_HEADER: usize = 12;
/// Length of `struct tcmsg`.
pub const TRAFFIC_HEADER: usize = 20;

/// `IFLA_INET_CONF`: in `IFLA_AF_SPEC`, `AF_INET`.
pub const IFLA_INET_CONF: u16 = 1;
/// `IFLA_INET6_CONF`: in `IFLA_AF_SPEC`, `AF_INET6`.
pub const IFLA_INET6_CONF: u16 = 2;
/// `IFLA_INET6_ADDR_GEN_MODE`: in `IFLA_AF_SPEC`, `AF_INET6`.
pub const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// `IN6_ADDR_GEN_MODE_NONE`: the kernel makes no link-local address.
pub const ADDR_GEN_MODE_NONE: u8 = 1;
/// `IFA_PROTO`: who made the address.
pub const IFA_PROTO: u16 = 11;
/// `IFAPROT_KERNEL_RA`: the kernel, as a router told it.
pub const IFAPROT_KERNEL_RA: u8 = 2;
/// `RTA_NH_ID`: the number of a next hop that several routes share.
pub const RTA_NH_ID: u16 = 30;
/// `NLA_F_NESTED`: the attribute consists of attributes.
pub const NESTED: u16 = 1 << 15;

/// `RTNLGRP_LINK`.
pub const GROUP_LINK: u32 = 1;
/// `RTNLGRP_NEIGH`.
pub const GROUP_NEIGHBOUR: u32 = 3;
/// `RTNLGRP_IPV4_IFADDR`.
pub const GROUP_ADDRESS4: u32 = 5;
/// `RTNLGRP_IPV4_ROUTE`.
pub const GROUP_ROUTE4: u32 = 7;
/// `RTNLGRP_IPV4_RULE`.
pub const GROUP_RULE4: u32 = 8;
/// `RTNLGRP_IPV6_IFADDR`.
pub const GROUP_ADDRESS6: u32 = 9;
/// `RTNLGRP_IPV6_ROUTE`.
pub const GROUP_ROUTE6: u32 = 11;
/// `RTNLGRP_IPV6_RULE`.
pub const GROUP_RULE6: u32 = 19;
