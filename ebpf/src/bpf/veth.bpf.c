// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The programs on the node's side of a pod's veth: what may leave the pod by its wire, and what may come in. Everything that a
 * workload is allowed goes over the pod's loopback to the agent, or directly to another pod of this node, so nothing else that
 * carries bytes of an application has business here, whoever made its socket and wherever: no program on cgroups sees packet
 * sockets, or sockets made outside or before.
 *
 * Directly: a packet of a stamped connection is put into the other pod from here, whatever its frame says. It passes no bridge,
 * route or wire of the node, by which a pod could send it elsewhere; and what comes by these under the address of a pod of
 * this node is forged. For the same reason who has which MAC address is of no matter, and the pod gets one for an answer from here.
 *
 * Out: ARP, and the TCP reset by which the pod's kernel tells who came in clear that nobody listens. Who wrote a packet is not
 * asked: a clone that a packet program of the pod made, or a frame that came through a tap and a bridge there, is of no
 * socket. So every byte of what passes follows from something that came in, or from the pod's address and that of its
 * device: a pod is left with when, and which of those that came in it answers. Of IPv6 nothing passes, neighbour discovery
 * included: no pod may speak it, and its options have room for more.
 *
 * In: ARP about the pod, and IPv4 TCP to its address, which is judged by what it finds there; but HBONE (annex.h), and what a
 * policy lets in by its address (callers.h), are the agent's and reach no pod. Broadcast and multicast reach
 * sockets that no sk_lookup program is asked for; nothing that a pod is allowed needs them. */
#include "annex.h"
#include "callers.h"
#include "lease.h"
#include "stamps.h"

/* The pod's address, in network order, its device's, whether open connections stop with the lease, the index of the agent's
 * annex on the node (0: there is none), and the cookie of the pod's namespace: set by the agent for this veth before the
 * program is loaded. */
const volatile struct {
	u32 address;
	u8 mac[6];
	u8 strict;
	u8 pad;
	u32 annex;
	u64 netns;
} pod;

enum { ETH_LEN = 14, ARP_LEN = 28, IP_LEN = 20, TCP_LEN = 20, ETH_MIN = 60 };
enum { ARP_ETHER = 1, ARP_REQUEST = 1, ARP_REPLY = 2 };
enum { TCP_FIN = 0x01, TCP_SYN = 0x02, TCP_RST = 0x04, TCP_ACK = 0x10 };
/* As Linux makes a reset of no connection (tcp_v4_send_reset): DF, hence no id, and the default time to live. */
enum { IP_DF = 0x4000, IP_FRAGMENT = 0x3fff, RESET_TTL = 64, TOS_ECN = 0x03 };

struct ethernet {
	u8 destination[6];
	u8 source[6];
	u16 protocol;
};

struct arp {
	u16 hardware;
	u16 protocol;
	u8 hardware_len;
	u8 protocol_len;
	u16 operation;
	u8 sender_mac[6];
	u32 sender;
	u8 target_mac[6];
	u32 target;
} __attribute__((packed));

struct ip {
	u8 version_len;
	u8 tos;
	u16 len;
	u16 id;
	u16 fragment;
	u8 ttl;
	u8 protocol;
	u16 checksum;
	u32 source;
	u32 destination;
};

struct tcp {
	u16 source;
	u16 destination;
	u32 sequence;
	u32 ack;
	u8 offset;
	u8 flags;
	u16 window;
	u16 checksum;
	u16 urgent;
};

/* The sum of the TCP header begins with this (RFC 9293 section 3.1). */
struct pseudo {
	u32 source;
	u32 destination;
	u8 zero;
	u8 protocol;
	u16 len;
};

/* A packet that came in, and the reset that RFC 9293 section 3.10.7.1 has for it. */
struct knock_key {
	u32 peer;
	u16 peer_port;
	u16 pod_port;
};

struct knock {
	u32 sequence;
	u32 ack;
	u8 flags;
	u8 tos;
	u8 mac[6];
};

/* An answer follows at once; one that was evicted before leaves a caller that came in clear to its timeout. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_LRU_HASH);
	MAP_INT(max_entries, 1024);
	MAP_TYPE(key, struct knock_key);
	MAP_TYPE(value, struct knock);
} knocks SEC(".maps");

struct neighbour {
	u8 mac[6];
};

/* Who came in, by ARP or TCP: whom alone the pod may ask for, or answer. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_LRU_HASH);
	MAP_INT(max_entries, 256);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, struct neighbour);
} neighbours SEC(".maps");

INLINE int same_mac(const u8 *a, const volatile u8 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3] && a[4] == b[4] && a[5] == b[5];
}

INLINE int is_each(const u8 *mac, u8 byte)
{
	const u8 all[6] = { byte, byte, byte, byte, byte, byte };

	return same_mac(mac, all);
}

INLINE void meet(u32 address, const u8 *mac)
{
	struct neighbour n;

	__builtin_memcpy(n.mac, mac, sizeof(n.mac));
	bpf_map_update_elem(&neighbours, &address, &n, BPF_ANY);
}

INLINE int is_arp(struct sk_buff_view *skb, struct arp *a)
{
	return !bpf_skb_load_bytes(skb, ETH_LEN, a, sizeof(*a)) && a->hardware == htons(ARP_ETHER) &&
	       a->protocol == htons(ETH_P_IP) && a->hardware_len == 6 && a->protocol_len == 4 &&
	       (a->operation == htons(ARP_REQUEST) || a->operation == htons(ARP_REPLY));
}

INLINE int may_leave_arp(struct sk_buff_view *skb, const struct ethernet *eth)
{
	struct neighbour *n;
	struct arp a;
	u32 target;

	if (skb->len != ETH_LEN + ARP_LEN || !is_arp(skb, &a) || a.sender != pod.address || !same_mac(a.sender_mac, pod.mac))
		return 0;
	target = a.target;
	n = bpf_map_lookup_elem(&neighbours, &target);
	if (!n)
		return 0;
	if (a.operation == htons(ARP_REPLY))
		return same_mac(a.target_mac, n->mac) && same_mac(eth->destination, n->mac);
	return is_each(a.target_mac, 0) && (is_each(eth->destination, 0xff) || same_mac(eth->destination, n->mac));
}

/* Whether a header with its sum in it sums up. */
INLINE int sums_up(const void *bytes, u32 len, u32 seed)
{
	u32 sum = (u32)bpf_csum_diff(0, 0, bytes, len, seed);

	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum == 0xffff;
}

INLINE int is_whole_tcp4(const struct ip *ip)
{
	return ip->version_len == 0x45 && ip->protocol == IPPROTO_TCP && !(ip->fragment & htons(IP_FRAGMENT));
}

INLINE int is_bare_header(const struct ip *ip)
{
	return ip->version_len == 0x45 && ip->protocol == IPPROTO_TCP && ip->len == htons(IP_LEN + TCP_LEN) && !ip->id &&
	       ip->fragment == htons(IP_DF) && ip->ttl == RESET_TTL && ip->source == pod.address &&
	       sums_up(ip, IP_LEN, 0);
}

INLINE int is_answer(const struct ip *ip, const struct tcp *t, const struct ethernet *eth, const struct knock *knock)
{
	const struct pseudo pseudo = { ip->source, ip->destination, 0, IPPROTO_TCP, htons(TCP_LEN) };

	return t->offset == (TCP_LEN / 4) << 4 && t->flags == knock->flags && t->sequence == knock->sequence &&
	       t->ack == knock->ack && !t->window && !t->urgent &&
	       (ip->tos == knock->tos || ip->tos == (knock->tos & ~TOS_ECN)) && same_mac(eth->destination, knock->mac) &&
	       sums_up(t, TCP_LEN, (u32)bpf_csum_diff(0, 0, (void *)&pseudo, sizeof(pseudo), 0));
}

INLINE int may_leave_reset(struct sk_buff_view *skb, const struct ethernet *eth, const struct ip *ip)
{
	struct knock_key key = { .peer = ip->destination };
	struct knock *knock;
	struct tcp t;

	if (skb->len != ETH_LEN + IP_LEN + TCP_LEN || !is_bare_header(ip) ||
	    bpf_skb_load_bytes(skb, ETH_LEN + IP_LEN, &t, sizeof(t)))
		return 0;
	key.peer_port = t.destination;
	key.pod_port = t.source;
	knock = bpf_map_lookup_elem(&knocks, &key);
	if (!knock || !is_answer(ip, &t, eth, knock))
		return 0;
	bpf_map_delete_elem(&knocks, &key);
	return 1;
}

/* Also what an event tells of the packet: zeros where it is no IPv4. */
INLINE int may_leave(struct sk_buff_view *skb, struct ip *ip)
{
	struct ethernet eth;

	if (skb->protocol == htons(ETH_P_IP) && bpf_skb_load_bytes(skb, ETH_LEN, ip, sizeof(*ip)))
		return 0;
	if (skb->vlan_present || bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)) || eth.protocol != skb->protocol ||
	    !same_mac(eth.source, pod.mac))
		return 0;
	return skb->protocol == htons(ETH_P_ARP) ? may_leave_arp(skb, &eth) :
	       skb->protocol == htons(ETH_P_IP)	 ? may_leave_reset(skb, &eth, ip) :
						   0;
}

INLINE int refuse(struct sk_buff_view *skb, const struct ip *ip, u32 reason, u64 cgroup)
{
	struct event *e;
	u16 port = 0;

	count(reason);
	e = reserve_half();
	if (!e)
		return TC_ACT_SHOT;
	if (ip->version_len == 0x45 && (ip->protocol == IPPROTO_TCP || ip->protocol == IPPROTO_UDP))
		bpf_skb_load_bytes(skb, ETH_LEN + IP_LEN + 2, &port, sizeof(port));
	e->time_ns = bpf_ktime_get_boot_ns();
	e->cgroup = cgroup;
	e->source = 0;
	e->destination = 0;
	e->source_address = ip->source;
	e->address = ip->destination;
	e->port = ntohs(port);
	e->pad = 0;
	e->rule = 0;
	e->reason = reason;
	e->pad2 = 0;
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
	return TC_ACT_SHOT;
}

/* A stream socket of the pod's wrote it: no raw or packet socket, and no copy, which is of none. */
INLINE int is_of_stream(struct sk_buff_view *skb)
{
	struct bpf_sock *sk = skb->sk;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	return sk && sk->type == SOCK_STREAM && sk->protocol == IPPROTO_TCP;
}

/* Of a stamped connection: only its caller opens it, and only once; bytes are a stream socket's. (The kernel's own resets and
 * last acknowledgements are of a raw socket or of none, and carry no bytes.) */
INLINE int may_pass(struct sk_buff_view *skb, const struct stamp *s, const struct tcp *t, int is_caller)
{
	int opens = (t->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	u32 header = (t->offset >> 4) * 4;

	if (s->closed_ns && (opens || bpf_ktime_get_boot_ns() - s->closed_ns > STAMP_LINGER_NS))
		return 0;
	if (header < TCP_LEN || (opens && !is_caller))
		return 0;
	return (!opens && skb->len <= ETH_LEN + IP_LEN + header) || is_of_stream(skb);
}

/* The device behind which the other end of a stamped connection is; 0 where this is none. Either end must be the very pod
 * that it was when it was stamped, not one that got its address. */
INLINE u32 goes_to(struct sk_buff_view *skb, const struct ip *ip)
{
	u32 to = ip->destination;
	struct local *other;
	struct stamp *s;
	struct tcp t;
	int is_caller;

	if (ip->source != pod.address || !is_whole_tcp4(ip) || bpf_skb_load_bytes(skb, ETH_LEN + IP_LEN, &t, sizeof(t)))
		return 0;
	s = find_stamp(ip->source, ntohs(t.source), to, ntohs(t.destination));
	if (!s || (pod.strict && lease_is_over()))
		return 0;
	is_caller = s->caller_address == pod.address;
	if ((is_caller ? s->caller_netns : s->called_netns) != pod.netns || !may_pass(skb, s, &t, is_caller))
		return 0;
	other = bpf_map_lookup_elem(&locals, &to);
	return other && other->netns == (is_caller ? s->called_netns : s->caller_netns) ? other->device : 0;
}

INLINE int put_into_pod(struct sk_buff_view *skb, u32 device)
{
	bpf_skb_change_type(skb, PACKET_HOST);
	return (int)bpf_redirect_peer(device, 0);
}

/* A locally administered MAC address, of nobody. (Not a constant array: that would be in the agent's constants.) */
INLINE void set_nobody(u8 *mac)
{
	mac[0] = 0x02;
	mac[1] = 'a';
	mac[2] = 'm';
	mac[3] = 'b';
	mac[4] = 'i';
	mac[5] = 't';
}

/* A pod that may be spoken to directly asks for an address, of which nobody on the wire has been heard: the answer is written
 * over the question, and goes back into the pod. */
INLINE int is_answered(struct sk_buff_view *skb)
{
	u32 own = pod.address, asked;
	struct ethernet eth;
	struct arp a;

	if (skb->protocol != htons(ETH_P_ARP) || skb->vlan_present || skb->len != ETH_LEN + ARP_LEN || !is_arp(skb, &a) ||
	    bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)) || !same_mac(eth.source, pod.mac) ||
	    a.operation != htons(ARP_REQUEST) || a.sender != own || !same_mac(a.sender_mac, pod.mac) || a.target == own ||
	    !bpf_map_lookup_elem(&locals, &own))
		return 0;
	asked = a.target;
	a.operation = htons(ARP_REPLY);
	a.target = own;
	a.sender = asked;
	__builtin_memcpy(a.target_mac, eth.source, sizeof(a.target_mac));
	set_nobody(a.sender_mac);
	__builtin_memcpy(eth.destination, eth.source, sizeof(eth.destination));
	set_nobody(eth.source);
	return !bpf_skb_store_bytes(skb, 0, &eth, sizeof(eth), 0) && !bpf_skb_store_bytes(skb, ETH_LEN, &a, sizeof(a), 0);
}

SEC("tcx/ingress")
int ambit_outbound(struct sk_buff_view *skb)
{
	struct ip ip = {};
	u32 device = 0;

	if (skb->protocol == htons(ETH_P_IP) && !skb->vlan_present && !bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)))
		device = goes_to(skb, &ip);
	if (device)
		return put_into_pod(skb, device);
	if (may_leave(skb, &ip))
		return TCX_NEXT;
	if (is_answered(skb))
		return put_into_pod(skb, skb->ifindex);
	return refuse(skb, &ip, CLEAR_OUTBOUND, bpf_skb_cgroup_id(skb));
}

INLINE void remember_knock(const struct ip *ip, const struct tcp *t, const struct ethernet *eth)
{
	struct knock_key key = { .peer = ip->source, .peer_port = t->source, .pod_port = t->destination };
	struct knock knock = { .tos = ip->tos };
	u32 bytes = ntohs(ip->len) - IP_LEN, header = (t->offset >> 4) * 4;

	if ((t->flags & TCP_RST) || header < TCP_LEN || header > bytes)
		return;
	__builtin_memcpy(knock.mac, eth->source, sizeof(knock.mac));
	if (t->flags & TCP_ACK) {
		knock.flags = TCP_RST;
		knock.sequence = t->ack;
	} else {
		knock.flags = TCP_RST | TCP_ACK;
		knock.ack = htonl(ntohl(t->sequence) + bytes - header + !!(t->flags & TCP_SYN) + !!(t->flags & TCP_FIN));
	}
	bpf_map_update_elem(&knocks, &key, &knock, BPF_ANY);
}

/* What pads the frame to the least that Ethernet carries is zeros (RFC 894). */
INLINE int is_padded_with_zeros(struct sk_buff_view *skb)
{
	u8 padding[ETH_MIN - ETH_LEN - ARP_LEN] = {}, any = 0;

	if (skb->len == ETH_LEN + ARP_LEN)
		return 1;
	if (skb->len != ETH_MIN || bpf_skb_load_bytes(skb, ETH_LEN + ARP_LEN, padding, sizeof(padding)))
		return 0;
	for (u32 n = 0; n < sizeof(padding); n++)
		any |= padding[n];
	return !any;
}

INLINE int may_enter_arp(struct sk_buff_view *skb)
{
	struct arp a;

	if (!is_arp(skb, &a) || a.target != pod.address || !is_padded_with_zeros(skb))
		return 0;
	meet(a.sender, a.sender_mac);
	return 1;
}

/* What a pod of this node sends to another does not come this way. */
INLINE int is_forged(const struct ip *ip)
{
	u32 from = ip->source;

	return !!bpf_map_lookup_elem(&locals, &from);
}

/* The pod is the very one that is said to be somebody, not one that got its address. */
INLINE int is_of_a_stranger(const struct ip *ip, const struct tcp *t)
{
	int opens = (t->flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	u32 own = pod.address;
	struct local *self;

	/* What looks as if it were open and is not is judged in the annex as what begins. */
	if ((opens || pod.strict) && lease_is_over())
		return 0;
	self = bpf_map_lookup_elem(&locals, &own);
	return self && self->netns == pod.netns && is_let_in(ip->source, self, ntohs(t->destination));
}

INLINE int enter_tcp(struct sk_buff_view *skb, const struct ethernet *eth, const struct ip *ip)
{
	struct tcp t;

	if (!is_whole_tcp4(ip) || bpf_skb_load_bytes(skb, ETH_LEN + IP_LEN, &t, sizeof(t)))
		return refuse(skb, ip, PLAIN_INBOUND, 0);
	if (t.source == htons(HBONE_PORT) || t.destination == htons(HBONE_PORT))
		return pod.annex ? into_annex(skb, pod.annex) : refuse(skb, ip, AGENT_ABSENT, 0);
	if (is_forged(ip))
		return refuse(skb, ip, PLAIN_INBOUND, 0);
	if (is_of_a_stranger(ip, &t))
		return pod.annex ? into_annex(skb, pod.annex) : refuse(skb, ip, AGENT_ABSENT, 0);
	meet(ip->source, eth->source);
	remember_knock(ip, &t, eth);
	return TCX_NEXT;
}

/* Told is only what was meant for the pod: the rest is the noise of any network. */
SEC("tcx/egress")
int ambit_knock(struct sk_buff_view *skb)
{
	struct ethernet eth;
	struct ip ip;

	if (skb->vlan_present || bpf_skb_load_bytes(skb, 0, &eth, sizeof(eth)) || eth.protocol != skb->protocol)
		return TC_ACT_SHOT;
	if (skb->protocol == htons(ETH_P_ARP))
		return may_enter_arp(skb) ? TCX_NEXT : TC_ACT_SHOT;
	if (skb->protocol != htons(ETH_P_IP) || bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)) ||
	    ip.destination != pod.address)
		return TC_ACT_SHOT;
	return enter_tcp(skb, &eth, &ip);
}

char _license[] SEC("license") = "Dual BSD/GPL";
