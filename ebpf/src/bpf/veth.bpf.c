// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The programs on the node's side of a pod's veth: what may leave the pod by its wire. Everything that a workload is allowed
 * goes over the pod's loopback to the agent, so nothing that carries bytes of an application has business here, whoever made
 * its socket and wherever: no program on cgroups sees packet sockets, or sockets made outside or before.
 *
 * What passes: ARP, and the TCP reset by which the pod's kernel tells who came in clear that nobody listens. A reset has room
 * for some bytes too, so only the very one passes that answers a packet which came in. Of IPv6 nothing passes, neighbour
 * discovery included: no pod may speak it, and its options have room for more. */
#include "ambit.h"

/* Set by the agent for this pod before the program is loaded; network order. */
const volatile u32 pod_address;

enum { ETH_LEN = 14, ARP_LEN = 28, IP_LEN = 20, TCP_LEN = 20 };
enum { ARP_ETHER = 1, ARP_REQUEST = 1, ARP_REPLY = 2 };
enum { TCP_FIN = 0x01, TCP_SYN = 0x02, TCP_RST = 0x04, TCP_ACK = 0x10 };

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

/* A packet that came in, and the reset that RFC 9293 section 3.10.7.1 has for it. */
struct knock_key {
	u32 peer;
	u16 peer_port;
	u16 pod_port;
};

struct knock {
	u32 sequence;
	u32 ack;
	u32 flags;
};

/* An answer follows at once; one that was evicted before leaves a caller that came in clear to its timeout. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_LRU_HASH);
	MAP_INT(max_entries, 1024);
	MAP_TYPE(key, struct knock_key);
	MAP_TYPE(value, struct knock);
} knocks SEC(".maps");

/* A frame that a packet socket wrote carries what it likes, whatever its headers say; the kernel's own ARP is of no socket. */
INLINE int is_arp(struct sk_buff_view *skb)
{
	struct arp a;

	return !skb->sk && skb->len == ETH_LEN + ARP_LEN && !bpf_skb_load_bytes(skb, ETH_LEN, &a, sizeof(a)) &&
	       a.hardware == htons(ARP_ETHER) && a.protocol == htons(ETH_P_IP) && a.hardware_len == 6 &&
	       a.protocol_len == 4 && (a.operation == htons(ARP_REQUEST) || a.operation == htons(ARP_REPLY)) &&
	       a.sender == pod_address;
}

INLINE int is_answer(struct sk_buff_view *skb, u32 at, u32 bytes, struct knock_key *key)
{
	struct knock *knock;
	struct tcp t;

	if (bytes != TCP_LEN || skb->len != at + TCP_LEN || bpf_skb_load_bytes(skb, at, &t, sizeof(t)))
		return 0;
	key->peer_port = t.destination;
	key->pod_port = t.source;
	knock = bpf_map_lookup_elem(&knocks, key);
	if (!knock || t.offset != (TCP_LEN / 4) << 4 || t.flags != knock->flags || t.sequence != knock->sequence ||
	    t.ack != knock->ack || t.window || t.urgent)
		return 0;
	bpf_map_delete_elem(&knocks, key);
	return 1;
}

INLINE int is_whole_tcp4(const struct ip *ip)
{
	return ip->version_len == 0x45 && ip->protocol == IPPROTO_TCP && !(ip->fragment & htons(0x3fff));
}

INLINE int is_reset(struct sk_buff_view *skb, const struct ip *ip)
{
	struct knock_key key = { .peer = ip->destination };
	struct bpf_sock *sk = skb->sk;

	if (sk && sk->family != AF_INET)
		return 0;
	return is_whole_tcp4(ip) && ip->source == pod_address &&
	       is_answer(skb, ETH_LEN + IP_LEN, ntohs(ip->len) - IP_LEN, &key);
}

/* Also what an event tells of the packet: zeros where it is no IPv4. */
INLINE int may_leave(struct sk_buff_view *skb, struct ip *ip)
{
	if (skb->vlan_present)
		return 0;
	if (skb->protocol == htons(ETH_P_ARP))
		return is_arp(skb);
	return skb->protocol == htons(ETH_P_IP) && !bpf_skb_load_bytes(skb, ETH_LEN, ip, sizeof(*ip)) &&
	       is_reset(skb, ip);
}

INLINE int refuse(struct sk_buff_view *skb, const struct ip *ip)
{
	struct event *e;
	u16 port = 0;

	count(CLEAR_OUTBOUND);
	e = reserve_half();
	if (!e)
		return TC_ACT_SHOT;
	if (ip->version_len == 0x45 && (ip->protocol == IPPROTO_TCP || ip->protocol == IPPROTO_UDP))
		bpf_skb_load_bytes(skb, ETH_LEN + IP_LEN + 2, &port, sizeof(port));
	e->time_ns = bpf_ktime_get_boot_ns();
	e->cgroup = bpf_skb_cgroup_id(skb);
	e->source = 0;
	e->destination = 0;
	e->source_address = ip->source;
	e->address = ip->destination;
	e->port = ntohs(port);
	e->pad = 0;
	e->rule = 0;
	e->reason = CLEAR_OUTBOUND;
	e->pad2 = 0;
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
	return TC_ACT_SHOT;
}

SEC("tcx/ingress")
int ambit_outbound(struct sk_buff_view *skb)
{
	struct ip ip = {};

	return may_leave(skb, &ip) ? TCX_NEXT : refuse(skb, &ip);
}

INLINE void remember_knock(struct sk_buff_view *skb, u32 at, u32 bytes, struct knock_key *key)
{
	struct knock knock = {};
	struct tcp t;
	u32 header;

	if (bpf_skb_load_bytes(skb, at, &t, sizeof(t)) || (t.flags & TCP_RST))
		return;
	header = (t.offset >> 4) * 4;
	if (header < TCP_LEN || header > bytes)
		return;
	key->peer_port = t.source;
	key->pod_port = t.destination;
	if (t.flags & TCP_ACK) {
		knock.flags = TCP_RST;
		knock.sequence = t.ack;
	} else {
		knock.flags = TCP_RST | TCP_ACK;
		knock.ack = htonl(ntohl(t.sequence) + bytes - header + !!(t.flags & TCP_SYN) + !!(t.flags & TCP_FIN));
	}
	bpf_map_update_elem(&knocks, key, &knock, BPF_ANY);
}

/* Towards the pod: all passes, and is judged by what it finds there. */
SEC("tcx/egress")
int ambit_knock(struct sk_buff_view *skb)
{
	struct knock_key key = {};
	struct ip ip;

	if (skb->protocol != htons(ETH_P_IP) || bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)) || !is_whole_tcp4(&ip))
		return TCX_NEXT;
	key.peer = ip.source;
	remember_knock(skb, ETH_LEN + IP_LEN, ntohs(ip.len) - IP_LEN, &key);
	return TCX_NEXT;
}

char _license[] SEC("license") = "Dual BSD/GPL";
