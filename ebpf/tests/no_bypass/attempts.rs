//! What is tried. Each attempt is a line of Python that says what it was told; MARK is replaced by bytes of its own.

/// Name, who tries it, whether its bytes are seen where nothing is governed, and the attempt. All run as root, with every
/// capability: the worst that a workload could be given.
pub(crate) const ATTEMPTS: &[(&str, &str, bool, &str)] = &[
    ("an allowed connection", "client", true, "stream((FAR, 8080))"),
    ("a denied connection", "client", true, "stream((FAR, 9090))"),
    ("a v4-mapped one", "client", true, "stream(('::ffff:' + FAR, 9090))"),
    ("native IPv6", "client", true, "stream((FAR6, 9090))"),
    ("an allowed IPv6 connection", "client", true, "stream((FAR6, 8080))"),
    ("native IPv6, V6ONLY", "client", true, "stream((FAR6, 9090), option=(IPPROTO_IPV6, IPV6_V6ONLY, 1))"),
    ("native IPv6, bound", "client", true, "stream((FAR6, 9090), bind=(POD6, 0))"),
    ("a packet socket, UDP over IPv6", "client", true, "frame(0x86dd, ip6(17, udp()))"),
    ("a packet socket, as the agent's last leg", "client", true, "frame(0x86dd, ip6(6, segment(4000, 8080), LEG6))"),
    ("a raw socket, as the agent's last leg", "client", false, "raw6(6, POD6, segment(4000, 8080), LEG6)"),
    ("the agent's IPv6 addresses on purpose", "client", false, "stream((LEG6, 15001))"),
    ("the same from outside the mesh", "outsider", false, "stream((LEG6, 15001))"),
    ("to a pod of the same node", "client", true, "stream((NEAR, 9090))"),
    ("a stranger in the mesh", "stranger", true, "stream((FAR, 8080))"),
    ("a child, re-parented", "client", true, "orphan((FAR, 9090))"),
    ("SO_MARK", "client", true, "stream((FAR, 9090), option=(SOL_SOCKET, SO_MARK, 1))"),
    ("SO_BINDTODEVICE", "client", true, "stream((FAR, 8080), option=(SOL_SOCKET, SO_BINDTODEVICE, b'eth0'))"),
    ("bound to the pod's address", "client", true, "stream((FAR, 9090), bind=(POD, 0))"),
    ("TCP Fast Open", "client", true, "fastopen((FAR, 9090))"),
    ("multipath TCP", "client", true, "stream((FAR, 9090), protocol=262)"),
    ("UDP, connected", "client", true, "datagram((FAR, 9090), connected=True)"),
    ("UDP, sendto", "client", true, "datagram((FAR, 9090))"),
    ("UDP, v4-mapped", "client", true, "datagram(('::ffff:' + FAR, 9090))"),
    ("UDP, IPv6", "client", true, "datagram((FAR6, 9090))"),
    ("UDP, broadcast", "client", true, "datagram(('10.99.0.255', 9090), option=(SOL_SOCKET, SO_BROADCAST, 1))"),
    ("UDP, multicast", "client", true, "datagram(('224.0.0.251', 5353))"),
    ("UDP-Lite", "client", true, "datagram((FAR, 9090), protocol=136)"),
    ("ICMP echo, raw socket", "client", true, "raw(1, FAR, icmp())"),
    ("ICMP echo, ping socket", "client", true, "ping()"),
    ("a raw socket, own protocol", "client", true, "raw(253, FAR, MARK)"),
    ("a raw socket, IPv6", "client", true, "raw6(253, FAR6, MARK)"),
    ("a packet socket, UDP", "client", true, "frame(0x0800, ip(17, udp()))"),
    ("a packet socket, spoofed source", "client", true, "frame(0x0800, ip(17, udp(), source='10.99.0.77'))"),
    ("a packet socket, from 127/8", "client", true, "frame(0x0800, ip(17, udp(), source='127.0.0.9'))"),
    ("a packet socket, fragment", "client", true, "frame(0x0800, ip(17, MARK, fragment=0x2000))"),
    ("a packet socket, reset with bytes", "client", true, "frame(0x0800, ip(6, tcp(4) + MARK))"),
    ("a packet socket, bare reset", "client", true, "frame(0x0800, ip(6, tcp(4, MARK[:8])))"),
    ("a packet socket, ARP", "client", true, "frame(0x0806, arp() + MARK)"),
    ("a packet socket, ARP of right size", "client", true, "frame(0x0806, arp(MARK.ljust(10)))"),
    ("a packet socket, neighbour discovery", "client", true, "frame(0x86dd, ip6(58, b'\\x87\\0\\0\\0' + MARK))"),
    ("a packet socket, odd ethertype", "client", true, "frame(0x88b5, MARK + b'.' * 40)"),
    ("a packet socket, VLAN", "client", true, "frame(0x8100, b'\\0\\x05\\x08\\0' + ip(17, udp()))"),
    ("HBONE's port", "client", true, "stream((FAR, 15008))"),
    ("HBONE's port, from outside the mesh", "outsider", true, "stream((FAR, 15008))"),
    ("a packet socket, to HBONE's port", "client", true, "frame(0x0800, ip(6, segment(4000, 15008)))"),
    ("a packet socket, from HBONE's port", "client", true, "frame(0x0800, ip(6, segment(15008, 4000)))"),
    ("a raw socket, from HBONE's port", "outsider", true, "raw(6, FAR, segment(15008, 4000))"),
    ("a socket from outside the mesh", "outsider", true, "stream((FAR, 8080))"),
    ("UDP from outside the mesh", "outsider", true, "datagram((FAR, 9090))"),
    ("IPv6 from outside the mesh", "outsider", true, "stream((FAR6, 9090))"),
    ("a raw socket from outside", "outsider", true, "raw(253, FAR, MARK)"),
    ("neighbour discovery from outside", "outsider", true, "raw6(58, FAR6, b'\\x87\\0\\0\\0' + MARK)"),
    ("a bare reset from outside", "outsider", true, "raw(6, FAR, tcp(4, MARK[:8]))"),
    ("a bare reset with ACK from outside", "outsider", true, "raw(6, FAR, tcp(0x14, MARK[:8]))"),
    ("a packet socket from outside", "outsider", true, "frame(0x0800, ip(17, udp()))"),
    ("made outside, moved in", "outsider", true, "moved('client', (FAR, 8080))"),
    ("made inside, moved out", "client", true, "moved('..', (FAR, 9090))"),
    ("a descriptor passed in", "client", true, "passed((FAR, 9090))"),
    ("connected before enrolment", "before", true, "send_before()"),
    ("connected before, from the mesh", "before-client", true, "send_before()"),
    ("a squatter on the capture port", "client", false, "squat((FAR, 8080))"),
    ("a squatter on the capture port, IPv6", "client", false, "squat((FAR6, 8080))"),
    ("the capture address on purpose", "client", false, "stream(('127.3.3.3', 15001))"),
    ("the pod's own loopback", "client", false, "own_loopback()"),
    ("the pod's own loopback, IPv6", "client", false, "own_loopback('::1')"),
];

/// What the attempts are made of.
pub(crate) const TOOLS: &str = r#"
import array, fcntl, os, threading
from socket import *
import socket
TIMEOUT = 0.4
MAC = fcntl.ioctl(socket.socket(AF_INET, SOCK_DGRAM), 0x8927, b'eth0' + bytes(252))[18:24].hex()
def failed(e): return errno.errorcode.get(e.errno, 'timed out') if e.errno else 'timed out'
def made(to, kind, protocol=0, option=None, bind=None):
    s = socket.socket(AF_INET6 if ':' in to[0] else AF_INET, kind, protocol)
    s.settimeout(TIMEOUT)
    if option: s.setsockopt(*option)
    if bind: s.bind(bind)
    return s
held = []
def stream(to, protocol=0, option=None, bind=None):
    s = made(to, SOCK_STREAM, protocol, option, bind)
    held.append(s)
    s.connect(to); s.sendall(MARK)
    return 'ok'
def fastopen(to):
    s = made(to, SOCK_STREAM); held.append(s)
    s.settimeout(None); s.setsockopt(SOL_SOCKET, SO_SNDTIMEO, struct.pack('ll', 0, 400000))
    s.sendto(MARK, 0x20000000, to)
    return 'ok'
def datagram(to, protocol=0, connected=False, option=None):
    with made(to, SOCK_DGRAM, protocol, option) as s:
        if connected: s.connect(to); s.send(MARK)
        else: s.sendto(MARK, to)
    return 'ok'
def raw(protocol, to, body):
    with socket.socket(AF_INET, SOCK_RAW, protocol) as s: s.sendto(body, (to, 0))
    return 'ok'
LEG6 = 'fd61:6d62:6974:0:ffff:ffff:1:2'
def raw6(protocol, to, body, source=None):
    with socket.socket(AF_INET6, SOCK_RAW, protocol) as s:
        if source: s.setsockopt(IPPROTO_IPV6, 78, 1); s.bind((source, 0))
        s.setsockopt(IPPROTO_IPV6, IPV6_UNICAST_HOPS, 255)
        s.sendto(body, (to, 0))
    return 'ok'
def checksum(b):
    b += b'\0' * (len(b) % 2)
    n = sum(struct.unpack('!%dH' % (len(b) // 2), b))
    while n >> 16: n = (n & 0xffff) + (n >> 16)
    return ~n & 0xffff
def icmp():
    body = struct.pack('!BBHHH', 8, 0, 0, 7, 1) + MARK
    return body[:2] + struct.pack('!H', checksum(body)) + body[4:]
def ping():
    with socket.socket(AF_INET, SOCK_DGRAM, 1) as s: s.sendto(icmp(), (FAR, 0))
    return 'ok'
def udp(): return struct.pack('!HHHH', 4000, 9090, 8 + len(MARK), 0) + MARK
def tcp(flags, seq_ack=b'\0' * 8): return struct.pack('!HH', 4000, 9090) + seq_ack + struct.pack('!BBHHH', 0x50, flags, 0, 0, 0)
def segment(here, there): return struct.pack('!HHIIBBHHH', here, there, 7, 7, 0x50, 0x18, 1000, 0, 0) + MARK
def arp(end=b'\0' * 10):
    return struct.pack('!HHBBH', 1, 0x800, 6, 4, 1) + bytes.fromhex(MAC) + inet_aton(POD) + end
def ip(protocol, inner, source=None, fragment=0, to=None):
    def head(sum): return struct.pack('!BBHHHBBH', 0x45, 0, 20 + len(inner), 1, fragment, 64, protocol, sum) + inet_aton(source or POD) + inet_aton(to or FAR)
    return head(checksum(head(0))) + inner
def ip6(protocol, inner, source=None):
    return struct.pack('!IHBB', 6 << 28, len(inner), protocol, 255) + inet_pton(AF_INET6, source or POD6) + inet_pton(AF_INET6, FAR6) + inner
def frame(kind, body, by='eth0', to=b'\xff' * 6, source=None):
    with socket.socket(AF_PACKET, SOCK_RAW) as s:
        s.bind((by, 0))
        s.send(to + (source or bytes.fromhex(MAC)) + struct.pack('!H', kind) + body)
    return 'ok'
def reset(ports, to, id=0, tos=0, ttl=64, fragment=0x4000, window=0, end=b'', sum=None, source=None):
    def inner(sum): return ports + struct.pack('!IIBBHHH', 0, 8, 0x50, 0x14, window, sum, 0) + end
    sum = checksum(inet_aton(POD) + inet_aton(FAR) + struct.pack('!BBH', 0, 6, 20 + len(end)) + inner(0)) if sum is None else sum
    def outer(sum): return struct.pack('!BBHHHBBH', 0x45, tos, 40 + len(end), id, fragment, ttl, 6, sum) + inet_aton(POD) + inet_aton(FAR)
    return frame(0x0800, outer(checksum(outer(0))) + inner(sum), 'x0', to, source)
def in_child(act):
    r, w = os.pipe()
    if os.fork() == 0:
        os.close(r)
        try: said = act()
        except OSError as e: said = failed(e)
        os.write(w, said.encode()); os._exit(0)
    os.close(w); os.wait()
    out = b''
    while more := os.read(r, 100): out += more
    return out.decode()
def orphan(to):
    r, w = os.pipe()
    if os.fork() == 0:
        middle = os.getpid()
        if os.fork() == 0:
            while os.getppid() == middle: time.sleep(0.001)
            try: said = stream(to)
            except OSError as e: said = failed(e)
            os.write(w, said.encode()); os._exit(0)
        os._exit(0)
    os.wait()
    return os.read(r, 100).decode()
def moved(where, to):
    def act():
        s = made(to, SOCK_STREAM)
        with open(f'{MESH}/{where}/cgroup.procs', 'w') as f: f.write(str(os.getpid()))
        s.connect(to); s.sendall(MARK); return 'ok'
    return in_child(act)
def passed(to):
    ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
    if os.fork() == 0:
        with open(f'{MESH}/../cgroup.procs', 'w') as f: f.write(str(os.getpid()))
        s = made(to, SOCK_STREAM)
        try: s.connect(to); said = b'k'
        except OSError as e: said = b'x'
        theirs.sendmsg([said], [(SOL_SOCKET, SCM_RIGHTS, array.array('i', [s.fileno()]))])
        os._exit(0)
    os.wait()
    said, parts, _, _ = ours.recvmsg(1, CMSG_LEN(4))
    s = socket.socket(fileno=struct.unpack('i', parts[0][2])[0]); held.append(s)
    s.settimeout(TIMEOUT); s.sendall(MARK)
    return 'ok'
def squat(to):
    came = []
    def listen(host):
        s = socket.socket(AF_INET6 if ':' in host else AF_INET); s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        try: s.bind((host, 15001)); s.listen(); s.settimeout(TIMEOUT); came.append(s.accept()[0].recv(100))
        except OSError: pass
        s.close()
    threads = [threading.Thread(target=listen, args=(h,)) for h in (('::', '::1', POD6) if ':' in to[0] else ('0.0.0.0', '127.0.0.1', POD))]
    for t in threads: t.start()
    try: time.sleep(0.05); stream(to)
    except OSError: pass
    for t in threads: t.join()
    return 'bytes came' if came else 'nobody came'
def own_loopback(host='127.0.0.1'):
    s = socket.create_server((host, 7777), family=AF_INET6 if ':' in host else AF_INET)
    c = socket.create_connection((host, 7777), TIMEOUT); c.sendall(MARK)
    got = s.accept()[0].recv(100); s.close(); c.close()
    return 'ok' if got == MARK else 'lost'
def attempt(mark, act):
    global MARK
    MARK = mark.encode()
    try: return eval(act)
    except OSError as e: return failed(e)
"#;
