// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Programs on the node's mesh cgroup: who may connect to what, and where an allowed connection goes instead.
 *
 * Returning 0 without bpf_set_retval() is EPERM. Every path that does not positively allow returns 0. */
#include "client.h"
#include "decide.h"
#include "direct.h"

struct {
	MAP_INT(type, BPF_MAP_TYPE_SK_STORAGE);
	MAP_INT(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, s32);
	MAP_TYPE(value, struct socket_flow);
} sockets SEC(".maps");

/* Flows not yet taken by the agent. Not LRU: an eviction would lose a live flow. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 16384);
	MAP_TYPE(key, struct flow_key);
	MAP_TYPE(value, struct flow);
} flows SEC(".maps");

/* 127.a.b.c by endpoint, 1 <= a <= 254: one address alone would have one range of source ports. */
INLINE u32 capture_address(const struct attempt *a)
{
	u32 h = (a->endpoint_address ^ a->endpoint_port) * 0x9e3779b1u;

	h ^= h >> 15;
	return htonl((LOOPBACK_NET << 24) | ((1 + ((h >> 16) & 0xff) % 254) << 16) | (h & 0xffff));
}

/* Keeps the flow with its socket, for sockops and getpeername. */
INLINE u32 remember(struct bpf_sock *sk, const struct attempt *a, int direct)
{
	struct socket_flow *s = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!s)
		return NO_MEMORY;
	s->flow.asked_address = a->address;
	s->flow.asked_port = a->port;
	s->flow.endpoint_address = a->endpoint_address;
	s->flow.endpoint_port = a->endpoint_port;
	s->flow.identity = a->destination;
	s->flow.closed_ns = 0;
	s->cgroup = a->cgroup;
	s->opened_ns = 0;
	s->source = a->source;
	s->direct = direct;
	return direct ? DIRECT : ALLOWED;
}

INLINE u32 decide_remote(struct bpf_sock_addr *ctx, struct bpf_sock *sk, struct attempt *a)
{
	u64 netns = bpf_get_netns_cookie(ctx);
	u32 reason;

	if (ctx->type != SOCK_STREAM || ctx->protocol != IPPROTO_TCP)
		return NOT_TCP;
	if (sk->bound_dev_if && sk->bound_dev_if != LOOPBACK_IFINDEX)
		return BOUND_DEVICE;
	reason = decide_by_tables(a, netns);
	return reason == ALLOWED ? remember(sk, a, goes_directly(sk, a, netns)) : reason;
}

/* The whole decision for an IPv4 destination: ALLOWED (rewrite it), DIRECT or LOOPBACK (leave it), or why it is refused. */
INLINE u32 decide(struct bpf_sock_addr *ctx, struct attempt *a)
{
	struct bpf_sock *sk = ctx->sk;
	u32 reason = identify(a, bpf_get_current_cgroup_id());

	if (!sk)
		return NO_MEMORY;
	/* A socket whose earlier attempt failed may be used again: nothing of that attempt may survive. */
	bpf_sk_storage_delete(&sockets, sk);
	if (reason != ALLOWED)
		return reason;
	if (in_loopback(a->address))
		return a->port == CAPTURE_PORT ? CAPTURE_ADDRESS : LOOPBACK;
	return decide_remote(ctx, sk, a);
}

/* The one place where a reason becomes a return value: anything but the good ones refuses. */
INLINE int verdict(const struct attempt *a, u32 reason)
{
	if (reason == DIRECT) {
		count(DIRECT);
		record(a, ALLOWED);
		return 1;
	}
	record(a, reason);
	if (reason == NO_HEALTHY_ENDPOINT)
		bpf_set_retval(-ECONNREFUSED);
	return reason == ALLOWED || reason == LOOPBACK;
}

/* Only of these does every way to send pass the programs below: UDP-Lite, SCTP, ICMP and raw sockets have none on theirs. */
INLINE int is_governed(const struct bpf_sock *sk)
{
	if (sk->family != AF_INET && sk->family != AF_INET6)
		return 0;
	if (sk->type == SOCK_STREAM)
		return sk->protocol == IPPROTO_TCP || sk->protocol == IPPROTO_MPTCP;
	return sk->type == SOCK_DGRAM && sk->protocol == IPPROTO_UDP;
}

/* The kernel asks for AF_INET and AF_INET6 alone: AF_UNIX, AF_NETLINK and AF_PACKET sockets do not come here. */
SEC("cgroup/sock_create")
int ambit_sock_create(struct bpf_sock *sk)
{
	struct attempt a = {};

	if (is_governed(sk))
		return 1;
	identify(&a, bpf_get_current_cgroup_id());
	a.port = (u16)sk->protocol;
	record(&a, SOCKET_KIND);
	return 0;
}

SEC("cgroup/connect4")
int ambit_connect4(struct bpf_sock_addr *ctx)
{
	struct attempt a = { .address = ctx->user_ip4, .port = ntohs((u16)ctx->user_port) };
	u32 reason = decide(ctx, &a);

	if (reason == ALLOWED) {
		ctx->user_ip4 = capture_address(&a);
		ctx->user_port = htons(CAPTURE_PORT);
	}
	return verdict(&a, reason);
}

#include "mesh6.h"

INLINE int is_mapped(struct bpf_sock_addr *ctx)
{
	return ctx->user_ip6[0] == 0 && ctx->user_ip6[1] == 0 && ctx->user_ip6[2] == htonl(0xffff);
}

/* A v4-mapped destination is the IPv4 one. */
SEC("cgroup/connect6")
int ambit_connect6(struct bpf_sock_addr *ctx)
{
	struct attempt a = { .port = ntohs((u16)ctx->user_port) };
	struct bpf_sock *sk = ctx->sk;
	u32 reason;

	if (!is_mapped(ctx))
		return connect_native6(ctx);
	if (sk)
		bpf_sk_storage_delete(&sockets6, sk);
	a.address = ctx->user_ip6[3];
	reason = decide(ctx, &a);
	if (reason == ALLOWED) {
		ctx->user_ip6[3] = capture_address(&a);
		ctx->user_port = htons(CAPTURE_PORT);
	}
	return verdict(&a, reason);
}

/* Datagrams with an address of their own: within the pod's loopback, or not at all. */
INLINE u32 decide_datagram(struct attempt *a)
{
	u32 reason = identify(a, bpf_get_current_cgroup_id());

	if (reason != ALLOWED)
		return reason;
	if (!in_loopback(a->address))
		return NOT_TCP;
	return a->port == CAPTURE_PORT ? CAPTURE_ADDRESS : LOOPBACK;
}

SEC("cgroup/sendmsg4")
int ambit_sendmsg4(struct bpf_sock_addr *ctx)
{
	struct attempt a = { .address = ctx->user_ip4, .port = ntohs((u16)ctx->user_port) };

	return verdict(&a, decide_datagram(&a));
}

SEC("cgroup/sendmsg6")
int ambit_sendmsg6(struct bpf_sock_addr *ctx)
{
	struct attempt a = { .port = ntohs((u16)ctx->user_port) };

	if (!is_mapped(ctx))
		return send_native6(ctx);
	a.address = ctx->user_ip6[3];
	return verdict(&a, decide_datagram(&a));
}

/* The application sees the address it asked for, not the capture address; and of whom it accepted, not the last leg's. */
SEC("cgroup/getpeername4")
int ambit_getpeername4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_flow *s = sk ? bpf_sk_storage_get(&sockets, sk, 0, 0) : 0;
	const struct client *c = s ? 0 : client_of(sk);

	if (s) {
		ctx->user_ip4 = s->flow.asked_address;
		ctx->user_port = htons(s->flow.asked_port);
	} else if (c) {
		show_client4(ctx, c);
	}
	return 1;
}

SEC("cgroup/getpeername6")
int ambit_getpeername6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_flow *s = sk ? bpf_sk_storage_get(&sockets, sk, 0, 0) : 0;
	const struct client *c = s ? 0 : client_of(sk);

	if (show_peer6(ctx, sk))
		return 1;
	if (s) {
		ctx->user_ip6[3] = s->flow.asked_address;
		ctx->user_port = htons(s->flow.asked_port);
	} else if (c) {
		show_client6(ctx, c);
	}
	return 1;
}

/* Nor is the near end of a captured socket the one that it would have: it goes by loopback, and would say so. */
INLINE u32 own_address(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	u64 netns = bpf_get_netns_cookie(ctx);
	struct namespace *n;

	if (!sk || !bpf_sk_storage_get(&sockets, sk, 0, 0))
		return 0;
	n = bpf_map_lookup_elem(&namespaces, &netns);
	return n ? n->address : 0;
}

SEC("cgroup/getsockname4")
int ambit_getsockname4(struct bpf_sock_addr *ctx)
{
	u32 own = own_address(ctx);

	if (own && in_loopback(ctx->user_ip4))
		ctx->user_ip4 = own;
	return 1;
}

SEC("cgroup/getsockname6")
int ambit_getsockname6(struct bpf_sock_addr *ctx)
{
	u32 own = own_address(ctx);

	if (own && is_mapped(ctx) && in_loopback(ctx->user_ip6[3]))
		ctx->user_ip6[3] = own;
	else
		show_own6(ctx, ctx->sk);
	return 1;
}

/* Before the SYN exists: the source address and port are known now, so the agent can find the flow at accept(). */
INLINE void publish(struct bpf_sock_ops *ctx, struct socket_flow *s)
{
	s->key.netns_cookie = bpf_get_netns_cookie(ctx);
	s->key.client_address = ctx->local_ip4;
	s->key.capture_address = ctx->remote_ip4;
	s->key.client_port = (u16)ctx->local_port;
	if (bpf_map_update_elem(&flows, &s->key, &s->flow, BPF_ANY))
		count(FLOW_LOST); /* no record: the agent resets the connection */
	bpf_sock_ops_cb_flags_set(ctx, (int)(ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG));
}

/* An established flow may close before the agent accepted it, its bytes still to be read: then the record stays, marked,
 * and goes when the agent takes it or sweeps. One that never was established goes at once. */
INLINE void retire(struct bpf_sock_ops *ctx, struct socket_flow *s)
{
	struct flow *f;

	if (ctx->args[0] == TCP_SYN_SENT) {
		bpf_map_delete_elem(&flows, &s->key);
		return;
	}
	f = bpf_map_lookup_elem(&flows, &s->key);
	if (f)
		f->closed_ns = bpf_ktime_get_boot_ns();
}

INLINE void closed(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct socket_flow *s = bpf_sk_storage_get(&sockets, sk, 0, 0);
	struct stamp *called;

	if (s && s->direct)
		retire_stamp(ctx, s);
	else if (s)
		retire(ctx, s);
	else
		retire6(ctx, sk);
	called = s ? 0 : called_stamp(ctx);
	if (called && !called->called_closed_ns)
		called->called_closed_ns = bpf_ktime_get_boot_ns();
}

INLINE void established(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	if (called_stamp(ctx))
		bpf_sock_ops_cb_flags_set(ctx, (int)(ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG));
	else
		adopt_client(ctx, sk);
}

INLINE void connecting(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct socket_flow *s = bpf_sk_storage_get(&sockets, sk, 0, 0);

	if (s && s->direct)
		stamp(ctx, s);
	else if (s)
		publish(ctx, s);
	else
		publish6(ctx, sk);
}

SEC("sockops")
int ambit_sockops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	u32 op = ctx->op;

	if (!sk)
		return 1;
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		connecting(ctx, sk);
	else if (op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == TCP_CLOSE)
		closed(ctx, sk);
	else if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		established(ctx, sk);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
