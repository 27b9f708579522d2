//! What may pass a pod's wire, and that nothing rides on it: in, what the pod's kernel answers; out, the answer alone.

use crate::rig::Rig;
use crate::wires::{governed, inside};

/// Name, whether it may reach the pod, and what the far machine sends; FAR is the pod here.
const INTO_THE_POD: &[(&str, bool, &str)] = &[
    ("UDP", false, "datagram((FAR, 9090))"),
    ("UDP, broadcast", false, "datagram(('10.99.0.255', 9090), option=(SOL_SOCKET, SO_BROADCAST, 1))"),
    ("UDP, multicast", false, "datagram(('224.0.0.251', 5353), option=(IPPROTO_IP, IP_MULTICAST_IF, inet_aton(POD)))"),
    ("UDP, IPv6", false, "datagram((FAR6, 9090))"),
    ("ICMP echo", false, "raw(1, FAR, icmp())"),
    ("own protocol", false, "raw(253, FAR, MARK)"),
    ("a first fragment", false, "frame(0x0800, ip(6, tcp(2) + MARK, fragment=0x2000))"),
    ("a later fragment", false, "frame(0x0800, ip(6, MARK * 3, fragment=100))"),
    ("neighbour discovery", false, "frame(0x86dd, ip6(58, b'\\x87\\0\\0\\0' + MARK))"),
    ("odd ethertype", false, "frame(0x88b5, MARK + b'.' * 40)"),
    ("VLAN", false, "frame(0x8100, b'\\0\\x05\\x08\\0' + ip(6, tcp(2) + MARK))"),
    ("half a TCP header", false, "frame(0x0800, ip(6, MARK))"),
    ("TCP to somebody else", false, "frame(0x0800, ip(6, tcp(2) + MARK, to='10.99.0.77'))"),
    ("ARP for somebody else", false, "frame(0x0806, arp(MARK.ljust(10)))"),
    ("ARP with more behind", false, "frame(0x0806, arp(bytes(6) + inet_aton(FAR)) + bytes(10) + MARK)"),
    ("ARP longer than padded", false, "frame(0x0806, arp(bytes(6) + inet_aton(FAR)) + bytes(18) + MARK)"),
    ("TCP", true, "frame(0x0800, ip(6, tcp(2) + MARK))"),
];

#[test]
fn nothing_comes_in_but_arp_and_tcp_to_the_pod() {
    let mut rig = Rig::new();
    let mut capture = rig.capture_in_pod();
    let mut seen = |rig: &Rig, turn: u8| -> Vec<usize> {
        let mark = |n: usize| format!("IN{turn}x{n:04}");
        let acts: Vec<_> = INTO_THE_POD.iter().enumerate().map(|(n, act)| (mark(n), act.2)).collect();
        rig.send_in(&acts);
        capture.ask(&acts.iter().map(|(mark, _)| mark.as_str()).collect::<Vec<_>>().join(" "));
        capture.answer().split(' ').map(|n| n.parse().unwrap()).collect()
    };
    let control = seen(&rig, 0);
    let kernel = governed(&mut rig);
    kernel.drain_events(&mut |_| {}).unwrap();
    let before = kernel.counters().unwrap().denied[&ambit_ebpf::Reason::PlainInbound];
    let found = seen(&rig, 1);
    for ((name, passes, _), (open, now)) in INTO_THE_POD.iter().zip(control.into_iter().zip(found)) {
        assert!(open > 0, "{name} was not seen where nothing is governed: it proves nothing");
        assert_eq!(now > 0, *passes, "{name}, seen {now} times");
    }
    let told = kernel.counters().unwrap().denied[&ambit_ebpf::Reason::PlainInbound] - before;
    assert!((4..20).contains(&told), "what was meant for the pod is counted, the noise of the network is not: {told}");
    // What passes is what it takes to be refused at once, for somebody of whom neither knows the other's address.
    for namespace in [rig.node.pod.id(), rig.far()] {
        inside(namespace, "ip neigh flush all");
    }
    assert_eq!(rig.refused_inbound(), "ECONNREFUSED");
}

/// Name and arguments of `reset`: all but the first differ in one thing from what the pod's kernel would send.
const RESETS: &[(&str, &str)] = &[
    ("the very one", "FARMAC"),
    ("id", "FARMAC, id=0x4944"),
    ("type of service", "FARMAC, tos=4"),
    ("time to live", "FARMAC, ttl=63"),
    ("fragments allowed", "FARMAC, fragment=0"),
    ("reserved bit", "FARMAC, fragment=0xc000"),
    ("window", "FARMAC, window=1"),
    ("bytes", "FARMAC, end=b'four'"),
    ("checksum", "FARMAC, sum=0x4944"),
    ("its own MAC address", "FARMAC, source=b'\\x02abcde'"),
    ("another's MAC address", "b'\\xff' * 6"),
];

/// ARP of the right size and sender with bytes of choice, which the frame holds as MARK: what `frame` is told.
const ARPS: &[(&str, &str)] = &[
    ("who is asked for", "arp(bytes(6) + MARK[:4])"),
    ("the MAC address of whom", "arp(MARK[:6] + inet_aton(FAR))"),
    ("its own MAC address", "arp(bytes(6) + inet_aton(FAR)).replace(bytes.fromhex(MAC), MARK[:6]), source=MARK[:6]"),
    ("its own, in the frame", "arp(bytes(6) + inet_aton(FAR)), source=MARK[:6]"),
    ("its own, within", "arp(bytes(6) + inet_aton(FAR)).replace(bytes.fromhex(MAC), MARK[:6])"),
    ("to whom", "arp(bytes(6) + inet_aton(FAR)), to=MARK[:6]"),
    ("what pads it", "arp(bytes(6) + inet_aton(FAR)) + bytes(12) + MARK[:6]"),
    (
        "an answer nobody asked for",
        "arp(MARK[:6] + inet_aton(FAR)).replace(b'\\6\\4\\0\\1', b'\\6\\4\\0\\2'), to=MARK[:6]",
    ),
];

/// A packet program of the pod's own sends copies, which are of no socket, out by its wire: whatever comes to x0.
fn copy_to_the_wire(rig: &Rig) {
    let pod = rig.node.pod.id();
    inside(pod, "ip link add x0 type veth peer name x1");
    inside(pod, "ip link set x0 up");
    inside(pod, "ip link set x1 up");
    inside(pod, "tc qdisc add dev x0 clsact");
    let copy = "action mirred egress mirror dev eth0";
    inside(pod, &format!("tc filter add dev x0 egress protocol all u32 match u32 0 0 {copy}"));
}

#[test]
fn a_reset_or_an_arp_without_a_socket_has_room_for_nothing() {
    let mut rig = Rig::new();
    copy_to_the_wire(&rig);
    let (pod, far_mac) = (rig.node.pod.id(), rig.far_mac());
    let resets: Vec<(u8, &str, String)> = (b'a'..)
        .zip(RESETS)
        .map(|(n, (name, with))| (n, *name, format!("reset(MARK, {})", with.replace("FARMAC", &far_mac))))
        .collect();
    // By its ports a reset is known again.
    let try_reset = |rig: &mut Rig, n: u8, turn: u8, act: &str| {
        rig.knock(u16::from_be_bytes([b'S', turn]), u16::from_be_bytes([b'K', n]));
        rig.sent(pod, &format!("K{}S{}", char::from(n), char::from(turn)), act)
    };
    let try_arp = |rig: &mut Rig, n: usize, turn: u8, with: &str| {
        let mark = format!("B{turn}{n:02}ap");
        let held = if with.contains("MARK[:4]") { &mark[..4] } else { &mark };
        rig.sent(pod, held, &format!("frame(0x0806, {with}, by='x0')"))
    };
    for (n, name, act) in &resets {
        assert!(try_reset(&mut rig, *n, b'0', act) > 0, "{name} was not seen where nothing is governed");
    }
    for (n, (name, with)) in ARPS.iter().enumerate() {
        assert!(try_arp(&mut rig, n, 0, with) > 0, "{name} was not seen where nothing is governed");
    }
    let kernel = rig.open().unwrap();
    let open = rig.guard_fails(&kernel);
    assert!(matches!(open, ambit_ebpf::KernelError::OpenDevice { .. }), "{open}");
    rig.attach_only(&kernel);
    for (n, name, act) in &resets {
        let seen = try_reset(&mut rig, *n, b'1', act);
        assert_eq!(seen > 0, *name == "the very one", "a reset with another {name} was seen {seen} times");
    }
    for (n, (name, with)) in ARPS.iter().enumerate() {
        let seen = try_arp(&mut rig, n, 1, with);
        assert_eq!(seen, 0, "bytes in ARP, {name}");
    }
    // The second of two equal ones answers nothing.
    let again = try_reset(&mut rig, b'a', b'2', &resets[0].2) + rig.sent(pod, "KaS2", &resets[0].2);
    assert_eq!(again, 2, "one frame, counted before and after the second try");
}
