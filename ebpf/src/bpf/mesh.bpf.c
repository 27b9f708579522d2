// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Programs on the node's mesh cgroup: who may connect to what, and where an allowed connection goes instead.
 *
 * Returning 0 without bpf_set_retval() is EPERM. Every path that does not positively allow returns 0. */
#include "ambit.h"

struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY);
	MAP_INT(max_entries, CONFIG_LEN);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, u64);
} config SEC(".maps");

struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1024);
	MAP_TYPE(key, u64); /* cgroup id */
	MAP_TYPE(value, struct workload);
} workloads SEC(".maps");

/* Two generations of each table; config[CONFIG_GENERATION] says which is in force. The agent fills fresh inner maps,
 * puts them into the idle slots, then flips the one number: no program ever mixes two sets. (Sizes, not types: clang
 * keeps no type that only an inner map names.) */
struct verdict_table {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1);
	MAP_INT(key_size, sizeof(struct verdict_key));
	MAP_INT(value_size, sizeof(struct verdict));
};
struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	MAP_INT(max_entries, 2);
	MAP_TYPE(key, u32);
	MAP_ARRAY(values, struct verdict_table);
} verdicts SEC(".maps");

struct endpoint_table {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1);
	MAP_INT(key_size, sizeof(u32));   /* address */
	MAP_INT(value_size, sizeof(u32)); /* identity */
};
struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	MAP_INT(max_entries, 2);
	MAP_TYPE(key, u32);
	MAP_ARRAY(values, struct endpoint_table);
} endpoints SEC(".maps");

struct service_table {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1);
	MAP_INT(key_size, sizeof(struct service_key));
	MAP_INT(value_size, sizeof(struct service));
};
struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	MAP_INT(max_entries, 2);
	MAP_TYPE(key, u32);
	MAP_ARRAY(values, struct service_table);
} services SEC(".maps");

struct {
	MAP_INT(type, BPF_MAP_TYPE_SK_STORAGE);
	MAP_INT(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, s32);
	MAP_TYPE(value, struct socket_flow);
} sockets SEC(".maps");

/* Network namespaces that pod.bpf.c governs: only there does the capture address lead to the agent and nowhere else. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1024);
	MAP_TYPE(key, u64);   /* cookie */
	MAP_TYPE(value, u64); /* inode, for the agent's book-keeping */
} namespaces SEC(".maps");

/* Flows not yet taken by the agent. Not LRU: an eviction would lose a live flow. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 16384);
	MAP_TYPE(key, struct flow_key);
	MAP_TYPE(value, struct flow);
} flows SEC(".maps");

/* One connection attempt while it is judged. */
struct attempt {
	u32 address; /* as the application asked, network order */
	u16 port;    /* host order */
	u16 pad;
	u32 source;
	u32 destination;
	u32 endpoint_address;
	u16 endpoint_port;
	u16 pad2;
	u32 rule;
};

INLINE void report(const struct attempt *a, u32 reason)
{
	struct event *e;

	count(reason);
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(EVENT_LOST);
		return;
	}
	e->time_ns = bpf_ktime_get_boot_ns();
	e->cgroup = bpf_get_current_cgroup_id();
	e->source = a->source;
	e->destination = a->destination;
	e->source_address = 0;
	e->address = a->address;
	e->port = a->port;
	e->pad = 0;
	e->rule = a->rule;
	e->reason = reason;
	e->pad2 = 0;
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
}

INLINE u64 config_value(u32 index)
{
	u64 *value = bpf_map_lookup_elem(&config, &index);

	return value ? *value : 0;
}

/* First tier with a healthy endpoint, a random one of its healthy ones. */
INLINE int choose(struct attempt *a, const struct service *s)
{
	u32 random = bpf_get_prandom_u32();

	for (u32 tier = TIER_LOCAL; tier < TIERS; tier++) {
		u32 healthy = 0, skip;

		for (u32 i = 0; i < SERVICE_ENDPOINTS; i++)
			if (i < s->count && s->endpoints[i].healthy && s->endpoints[i].tier == tier)
				healthy++;
		if (!healthy)
			continue;
		skip = random % healthy;
		for (u32 i = 0; i < SERVICE_ENDPOINTS; i++) {
			const struct service_endpoint *e = &s->endpoints[i];

			if (i >= s->count || !e->healthy || e->tier != tier)
				continue;
			if (skip--)
				continue;
			a->destination = e->identity;
			a->endpoint_address = e->address;
			a->endpoint_port = e->port;
			return 1;
		}
	}
	return 0;
}

/* Fills destination and endpoint; returns ALLOWED or why not. */
INLINE u32 resolve(struct attempt *a, u32 generation)
{
	struct service_key key = { .address = a->address, .port = a->port };
	void *service_table = bpf_map_lookup_elem(&services, &generation);
	void *endpoint_table = bpf_map_lookup_elem(&endpoints, &generation);
	struct service *service;
	u32 *identity;

	if (!service_table || !endpoint_table)
		return NO_TABLES;
	service = bpf_map_lookup_elem(service_table, &key);
	if (service)
		return choose(a, service) ? ALLOWED : NO_HEALTHY_ENDPOINT;
	identity = bpf_map_lookup_elem(endpoint_table, &a->address);
	if (!identity)
		return UNKNOWN_DESTINATION;
	a->destination = *identity;
	a->endpoint_address = a->address;
	a->endpoint_port = a->port;
	return ALLOWED;
}

/* Deny wins over allow, exact port and every port alike; nothing is a deny. */
INLINE u32 judge(struct attempt *a, u32 generation)
{
	struct verdict_key key = { .source = a->source, .destination = a->destination, .port = a->endpoint_port };
	void *table = bpf_map_lookup_elem(&verdicts, &generation);
	struct verdict *exact, *any;

	if (!table)
		return NO_TABLES;
	exact = bpf_map_lookup_elem(table, &key);
	key.port = 0;
	any = bpf_map_lookup_elem(table, &key);
	if (exact && exact->action != ACTION_ALLOW) {
		a->rule = exact->rule;
		return POLICY_DENY;
	}
	if (any && any->action != ACTION_ALLOW) {
		a->rule = any->rule;
		return POLICY_DENY;
	}
	if (!exact && !any)
		return NO_VERDICT;
	a->rule = exact ? exact->rule : any->rule;
	return ALLOWED;
}

/* 127.a.b.c by endpoint, 1 <= a <= 254: one address alone would have one range of source ports. */
INLINE u32 capture_address(const struct attempt *a)
{
	u32 h = (a->endpoint_address ^ a->endpoint_port) * 0x9e3779b1u;

	h ^= h >> 15;
	return htonl((LOOPBACK_NET << 24) | ((1 + ((h >> 16) & 0xff) % 254) << 16) | (h & 0xffff));
}

/* Keeps the flow with its socket, for sockops and getpeername. */
INLINE u32 remember(struct bpf_sock *sk, const struct attempt *a)
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
	return ALLOWED;
}

/* Who calls. Any cgroup below the mesh cgroup that the agent did not enrol may do nothing, not even speak to itself. */
INLINE u32 identify(struct attempt *a)
{
	u64 cgroup = bpf_get_current_cgroup_id();
	struct workload *w = bpf_map_lookup_elem(&workloads, &cgroup);

	if (!w || !w->identity)
		return UNKNOWN_SOURCE;
	a->source = w->identity;
	return ALLOWED;
}

INLINE u32 decide_remote(struct bpf_sock_addr *ctx, struct bpf_sock *sk, struct attempt *a)
{
	u32 generation, reason;
	u64 netns;

	if (ctx->type != SOCK_STREAM || ctx->protocol != IPPROTO_TCP)
		return NOT_TCP;
	if (sk->bound_dev_if && sk->bound_dev_if != LOOPBACK_IFINDEX)
		return BOUND_DEVICE;
	if (bpf_ktime_get_boot_ns() >= config_value(CONFIG_LEASE_NS))
		return LEASE_EXPIRED;
	generation = (u32)config_value(CONFIG_GENERATION);
	reason = resolve(a, generation);
	if (reason != ALLOWED)
		return reason;
	reason = judge(a, generation);
	if (reason != ALLOWED)
		return reason;
	netns = bpf_get_netns_cookie(ctx);
	if (!bpf_map_lookup_elem(&namespaces, &netns))
		return NO_CAPTURE;
	return remember(sk, a);
}

/* The whole decision for an IPv4 destination: ALLOWED (rewrite it), LOOPBACK (leave it), or why it is refused. */
INLINE u32 decide(struct bpf_sock_addr *ctx, struct attempt *a)
{
	struct bpf_sock *sk = ctx->sk;
	u32 reason = identify(a);

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

/* The one place where a reason becomes a return value: anything but the two good ones refuses. */
INLINE int verdict(const struct attempt *a, u32 reason)
{
	switch (reason) {
	case ALLOWED:
	case LOOPBACK:
		count(reason);
		return 1;
	case NO_HEALTHY_ENDPOINT:
		report(a, reason);
		bpf_set_retval(-ECONNREFUSED);
		return 0;
	default:
		report(a, reason);
		return 0;
	}
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
	identify(&a);
	a.port = (u16)sk->protocol;
	report(&a, SOCKET_KIND);
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

INLINE int is_mapped(struct bpf_sock_addr *ctx)
{
	return ctx->user_ip6[0] == 0 && ctx->user_ip6[1] == 0 && ctx->user_ip6[2] == htonl(0xffff);
}

/* A v4-mapped destination is the IPv4 one; every other IPv6 destination is refused for now, ::1 included. */
SEC("cgroup/connect6")
int ambit_connect6(struct bpf_sock_addr *ctx)
{
	struct attempt a = { .port = ntohs((u16)ctx->user_port) };
	u32 reason;

	if (!is_mapped(ctx)) {
		reason = identify(&a);
		return verdict(&a, reason == ALLOWED ? NATIVE_IPV6 : reason);
	}
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
	u32 reason = identify(a);

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
	u32 reason;

	if (is_mapped(ctx)) {
		a.address = ctx->user_ip6[3];
		return verdict(&a, decide_datagram(&a));
	}
	reason = identify(&a);
	return verdict(&a, reason == ALLOWED ? NATIVE_IPV6 : reason);
}

/* The application sees the address it asked for, not the capture address. */
SEC("cgroup/getpeername4")
int ambit_getpeername4(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_flow *s = sk ? bpf_sk_storage_get(&sockets, sk, 0, 0) : 0;

	if (s) {
		ctx->user_ip4 = s->flow.asked_address;
		ctx->user_port = htons(s->flow.asked_port);
	}
	return 1;
}

SEC("cgroup/getpeername6")
int ambit_getpeername6(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_flow *s = sk ? bpf_sk_storage_get(&sockets, sk, 0, 0) : 0;

	if (s) {
		ctx->user_ip6[3] = s->flow.asked_address;
		ctx->user_port = htons(s->flow.asked_port);
	}
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

SEC("sockops")
int ambit_sockops(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct socket_flow *s;
	u32 op = ctx->op;

	if (!sk || (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_STATE_CB))
		return 1;
	if (op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] != TCP_CLOSE)
		return 1;
	s = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (!s)
		return 1;
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		publish(ctx, s);
	else
		retire(ctx, s);
	return 1;
}

char _license[] SEC("license") = "Dual BSD/GPL";
