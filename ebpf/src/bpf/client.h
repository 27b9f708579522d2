/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Who calls, for the socket that a workload accepts of the agent's last leg: part of mesh.bpf.c. The agent writes before it
 * connects; what was written goes to the accepted socket once that is established, and from there to accept() and
 * getpeername(). ebpf/src/layout.rs says the same in Rust. Addresses are IPv6 ones, of IPv4 as ::ffff:a.b.c.d. */
#ifndef AMBIT_CLIENT_H
#define AMBIT_CLIENT_H

#include "ambit.h"

/* What was written longer ago is of another connection: the agent waits a second for a workload. */
#define CLIENT_FRESH_NS (2ull * 1000 * 1000 * 1000)

/* The agent's socket, and the port that it connects to at the pod's address. */
struct client_key {
	u64 netns_cookie;
	u32 leg_address[4];
	u16 leg_port;
	u16 pod_port;
	u32 pad;
};

struct client {
	u32 address[4];
	u64 written_ns; /* boot time */
	u16 port;
	u16 pad[3];
};

/* Of connections that are being made. Not LRU: a full map costs a workload the name of its client, and nothing else. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 16384);
	MAP_TYPE(key, struct client_key);
	MAP_TYPE(value, struct client);
} clients SEC(".maps");

/* With the accepted socket, whoever has it. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_SK_STORAGE);
	MAP_INT(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, s32);
	MAP_TYPE(value, struct client);
} accepted SEC(".maps");

/* A connection is established at a listener: before accept() can have it. The last leg is the one from 127/8 to elsewhere. */
INLINE void adopt_client(struct bpf_sock_ops *ctx, struct bpf_sock *sk)
{
	struct client_key key = {};
	struct client *c;

	if (!in_loopback(ctx->remote_ip4) || in_loopback(ctx->local_ip4))
		return;
	key.netns_cookie = bpf_get_netns_cookie(ctx);
	key.leg_address[2] = htonl(0xffff);
	key.leg_address[3] = ctx->remote_ip4;
	key.leg_port = (u16)ntohl(ctx->remote_port);
	key.pod_port = (u16)ctx->local_port;
	c = bpf_map_lookup_elem(&clients, &key);
	if (!c)
		return;
	if (bpf_ktime_get_boot_ns() - c->written_ns < CLIENT_FRESH_NS)
		bpf_sk_storage_get(&accepted, sk, c, BPF_SK_STORAGE_GET_F_CREATE);
	bpf_map_delete_elem(&clients, &key);
}

INLINE const struct client *client_of(struct bpf_sock *sk)
{
	return sk ? bpf_sk_storage_get(&accepted, sk, 0, 0) : 0;
}

INLINE void show_client4(struct bpf_sock_addr *ctx, const struct client *c)
{
	if (c->address[0] || c->address[1] || c->address[2] != htonl(0xffff))
		return;
	ctx->user_ip4 = c->address[3];
	ctx->user_port = htons(c->port);
}

INLINE void show_client6(struct bpf_sock_addr *ctx, const struct client *c)
{
	ctx->user_ip6[0] = c->address[0];
	ctx->user_ip6[1] = c->address[1];
	ctx->user_ip6[2] = c->address[2];
	ctx->user_ip6[3] = c->address[3];
	ctx->user_port = htons(c->port);
}

#endif
