/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Native IPv6 of mesh.bpf.c: who is behind an address, and where an allowed connection goes instead. Verdicts are by identity,
 * so both families share their table; everything else has tables of its own, and IPv4 pays nothing for them.
 *
 * Everything goes through the agent: pods of one node have no direct way to each other by IPv6. */
#ifndef AMBIT_MESH6_H
#define AMBIT_MESH6_H

#include "decide.h"
#include "ipv6.h"

struct endpoint6_table {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1);
	MAP_INT(key_size, 16);            /* address */
	MAP_INT(value_size, sizeof(u32)); /* identity */
};
struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	MAP_INT(max_entries, 2);
	MAP_TYPE(key, u32);
	MAP_ARRAY(values, struct endpoint6_table);
} endpoints6 SEC(".maps");

struct service6_table {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1);
	MAP_INT(key_size, sizeof(struct service6_key));
	MAP_INT(value_size, sizeof(struct service6));
};
struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	MAP_INT(max_entries, 2);
	MAP_TYPE(key, u32);
	MAP_ARRAY(values, struct service6_table);
} services6 SEC(".maps");

/* Of `namespaces`, those in which the agent's /64 leads to the agent. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1024);
	MAP_TYPE(key, u64); /* cookie */
	MAP_TYPE(value, struct namespace6);
} namespaces6 SEC(".maps");

struct {
	MAP_INT(type, BPF_MAP_TYPE_SK_STORAGE);
	MAP_INT(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, s32);
	MAP_TYPE(value, struct socket_flow6);
} sockets6 SEC(".maps");

/* As `flows`. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 16384);
	MAP_TYPE(key, struct flow6_key);
	MAP_TYPE(value, struct flow6);
} flows6 SEC(".maps");

/* As `attempt`, of which the addresses are not used. */
struct attempt6 {
	struct attempt a;
	u32 address[4]; /* as the application asked, network order */
	u32 endpoint_address[4];
};

INLINE void record6(const struct attempt6 *t, u32 reason)
{
	struct event6 *e;

	if (!is_told(reason))
		return;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(EVENT_LOST);
		return;
	}
	fill_event(&e->event, &t->a, reason);
	COPY_ADDRESS(e->address, t->address);
	e->source_address[0] = 0;
	e->source_address[1] = 0;
	e->source_address[2] = 0;
	e->source_address[3] = 0;
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
}

INLINE int verdict6(const struct attempt6 *t, u32 reason)
{
	record6(t, reason);
	if (reason == NO_HEALTHY_ENDPOINT)
		bpf_set_retval(-ECONNREFUSED);
	return reason == ALLOWED || reason == LOOPBACK;
}

/* As choose(). */
INLINE int choose6(struct attempt6 *t, const struct service6 *s)
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
			const struct service6_endpoint *e = &s->endpoints[i];

			if (i >= s->count || !e->healthy || e->tier != tier)
				continue;
			if (skip--)
				continue;
			t->a.destination = e->identity;
			t->a.endpoint_port = e->port;
			COPY_ADDRESS(t->endpoint_address, e->address);
			return 1;
		}
	}
	return 0;
}

/* As resolve(); no range is of IPv6. */
INLINE u32 resolve6(struct attempt6 *t, u32 generation)
{
	struct service6_key key = { .port = t->a.port };
	void *service_table = bpf_map_lookup_elem(&services6, &generation);
	void *endpoint_table = bpf_map_lookup_elem(&endpoints6, &generation);
	struct service6 *service;
	u32 *identity;

	if (!service_table || !endpoint_table)
		return NO_TABLES;
	COPY_ADDRESS(key.address, t->address);
	service = bpf_map_lookup_elem(service_table, &key);
	if (service)
		return choose6(t, service) ? ALLOWED : NO_HEALTHY_ENDPOINT;
	identity = bpf_map_lookup_elem(endpoint_table, t->address);
	if (!identity)
		return UNKNOWN_DESTINATION;
	t->a.destination = *identity;
	t->a.endpoint_port = t->a.port;
	COPY_ADDRESS(t->endpoint_address, t->address);
	return ALLOWED;
}

/* As decide_by_tables(). */
INLINE u32 decide_by_tables6(struct attempt6 *t)
{
	u32 generation, reason;

	if (lease_is_over())
		return LEASE_EXPIRED;
	generation = (u32)config_value(CONFIG_GENERATION);
	reason = resolve6(t, generation);
	return reason == ALLOWED ? judge(&t->a, generation) : reason;
}

INLINE u32 remember6(struct bpf_sock *sk, const struct attempt6 *t)
{
	struct socket_flow6 *s = bpf_sk_storage_get(&sockets6, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!s)
		return NO_MEMORY;
	COPY_ADDRESS(s->flow.asked_address, t->address);
	COPY_ADDRESS(s->flow.endpoint_address, t->endpoint_address);
	s->flow.asked_port = t->a.port;
	s->flow.endpoint_port = t->a.endpoint_port;
	s->flow.identity = t->a.destination;
	s->flow.closed_ns = 0;
	return ALLOWED;
}

/* As decide() and decide_remote(). */
INLINE u32 decide6(struct bpf_sock_addr *ctx, struct attempt6 *t)
{
	struct bpf_sock *sk = ctx->sk;
	u64 netns = bpf_get_netns_cookie(ctx);
	u32 reason = identify(&t->a, bpf_get_current_cgroup_id());

	if (!sk)
		return NO_MEMORY;
	bpf_sk_storage_delete(&sockets, sk);
	bpf_sk_storage_delete(&sockets6, sk);
	if (reason != ALLOWED)
		return reason;
	if (is_one(t->address))
		return LOOPBACK;
	if (in_agent_net(t->address))
		return CAPTURE_ADDRESS;
	/* Whoever has no IPv6 address of its own calls nobody by IPv6. */
	if (!bpf_map_lookup_elem(&namespaces6, &netns))
		return NATIVE_IPV6;
	if (ctx->type != SOCK_STREAM || ctx->protocol != IPPROTO_TCP)
		return NOT_TCP;
	if (sk->bound_dev_if && sk->bound_dev_if != LOOPBACK_IFINDEX)
		return BOUND_DEVICE;
	reason = decide_by_tables6(t);
	return reason == ALLOWED ? remember6(sk, t) : reason;
}

/* By endpoint, as capture_address(). */
INLINE u32 capture_host(const struct attempt6 *t)
{
	const u32 *e = t->endpoint_address;
	u32 h = (e[0] ^ e[1] * 3 ^ e[2] * 5 ^ e[3] * 7 ^ t->a.endpoint_port) * 0x9e3779b1u;

	return h ^ h >> 15;
}

INLINE int connect_native6(struct bpf_sock_addr *ctx)
{
	struct attempt6 t = { .a = { .port = ntohs((u16)ctx->user_port) } };
	u32 reason;

	COPY_ADDRESS(t.address, ctx->user_ip6);
	reason = decide6(ctx, &t);
	if (reason == ALLOWED) {
		ctx->user_ip6[0] = AGENT_NET_0;
		ctx->user_ip6[1] = AGENT_NET_1;
		ctx->user_ip6[2] = htonl(1);
		ctx->user_ip6[3] = capture_host(&t);
		ctx->user_port = htons(CAPTURE_PORT);
	}
	return verdict6(&t, reason);
}

/* Datagrams with an address of their own: within the pod's loopback, or not at all. */
INLINE int send_native6(struct bpf_sock_addr *ctx)
{
	struct attempt6 t = { .a = { .port = ntohs((u16)ctx->user_port) } };
	u32 reason = identify(&t.a, bpf_get_current_cgroup_id());

	COPY_ADDRESS(t.address, ctx->user_ip6);
	if (reason == ALLOWED)
		reason = is_one(t.address) ? LOOPBACK : in_agent_net(t.address) ? CAPTURE_ADDRESS : NATIVE_IPV6;
	return verdict6(&t, reason);
}

/* True where the peer is one of IPv6, and shown as the application asked for it. */
INLINE int show_peer6(struct bpf_sock_addr *ctx, struct bpf_sock *sk)
{
	struct socket_flow6 *s = sk ? bpf_sk_storage_get(&sockets6, sk, 0, 0) : 0;

	if (!s)
		return 0;
	ctx->user_ip6[0] = s->flow.asked_address[0];
	ctx->user_ip6[1] = s->flow.asked_address[1];
	ctx->user_ip6[2] = s->flow.asked_address[2];
	ctx->user_ip6[3] = s->flow.asked_address[3];
	ctx->user_port = htons(s->flow.asked_port);
	return 1;
}

/* The near end of a captured socket has the agent's /64 or ::1 for address, and is shown with the pod's. */
INLINE void show_own6(struct bpf_sock_addr *ctx, struct bpf_sock *sk)
{
	u64 netns = bpf_get_netns_cookie(ctx);
	struct namespace6 *n;
	u32 address[4];

	if (!sk || !bpf_sk_storage_get(&sockets6, sk, 0, 0))
		return;
	COPY_ADDRESS(address, ctx->user_ip6);
	n = bpf_map_lookup_elem(&namespaces6, &netns);
	if (!n || !(in_agent_net(address) || is_one(address)))
		return;
	ctx->user_ip6[0] = n->address[0];
	ctx->user_ip6[1] = n->address[1];
	ctx->user_ip6[2] = n->address[2];
	ctx->user_ip6[3] = n->address[3];
}

/* As publish(). */
INLINE void publish6(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct socket_flow6 *s = bpf_sk_storage_get(&sockets6, sk, 0, 0);

	if (!s)
		return;
	s->key.netns_cookie = bpf_get_netns_cookie(ctx);
	COPY_ADDRESS(s->key.client_address, ctx->local_ip6);
	COPY_ADDRESS(s->key.capture_address, ctx->remote_ip6);
	s->key.client_port = (u16)ctx->local_port;
	if (bpf_map_update_elem(&flows6, &s->key, &s->flow, BPF_ANY))
		count(FLOW_LOST);
	bpf_sock_ops_cb_flags_set(ctx, (int)(ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG));
}

/* As retire(). */
INLINE void retire6(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct socket_flow6 *s = bpf_sk_storage_get(&sockets6, sk, 0, 0);
	struct flow6 *f;

	if (!s)
		return;
	if (ctx->args[0] == TCP_SYN_SENT) {
		bpf_map_delete_elem(&flows6, &s->key);
		return;
	}
	f = bpf_map_lookup_elem(&flows6, &s->key);
	if (f)
		f->closed_ns = bpf_ktime_get_boot_ns();
}

#endif
