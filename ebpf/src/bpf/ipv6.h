/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What IPv6 of workloads needs beside ambit.h. ebpf/src/layout.rs says the same in Rust.
 *
 * Within a governed network namespace a /64 is routed to lo, as 127/8 is without anybody's doing. Captured connections go to
 * an address of it, and the agent's last leg to the pod comes from one. No application may connect there. */
#ifndef AMBIT_IPV6_H
#define AMBIT_IPV6_H

#include "ambit.h"

/* fd61:6d62:6974::/64 ("ambit"), in network order. AGENT_NET of ambit-model is the same. */
#define AGENT_NET_0 htonl(0xfd616d62)
#define AGENT_NET_1 htonl(0x69740000)

/* Word by word: two of a context's at once the verifier does not take. */
#define COPY_ADDRESS(to, from) \
	do { \
		(to)[0] = ((const volatile u32 *)(from))[0]; \
		(to)[1] = ((const volatile u32 *)(from))[1]; \
		(to)[2] = ((const volatile u32 *)(from))[2]; \
		(to)[3] = ((const volatile u32 *)(from))[3]; \
	} while (0)

/* A governed network namespace of a pod that has an IPv6 address too. */
struct namespace6 {
	u64 inode; /* for the agent's book-keeping */
	u32 address[4]; /* the pod's */
};

struct service6_key {
	u32 address[4];
	u16 port;
	u16 pad;
};

/* Of IPv4 (v4-mapped) where the workload has no other address. */
struct service6_endpoint {
	u32 address[4];
	u32 identity;
	u16 port;
	u8 tier;
	u8 healthy;
};

struct service6 {
	u32 count;
	u32 pad;
	struct service6_endpoint endpoints[SERVICE_ENDPOINTS];
};

/* As flow_key and flow. */
struct flow6_key {
	u64 netns_cookie;
	u32 client_address[4];
	u32 capture_address[4];
	u16 client_port;
	u16 pad[3];
};

struct flow6 {
	u32 asked_address[4];
	u32 endpoint_address[4];
	u16 asked_port;
	u16 endpoint_port;
	u32 identity;
	u64 closed_ns; /* boot time; 0 while open */
};

struct socket_flow6 {
	struct flow6 flow;
	struct flow6_key key;
};

/* The agent's last leg to a pod while it is being connected: the exact tuple, for a source prefix proves nothing. */
struct leg_key {
	u64 netns_cookie;
	u32 source_address[4];
	u32 called_address[4];
	u16 source_port;
	u16 called_port;
	u32 pad;
};

/* An event with the addresses of one of IPv6, and those of `event` zero. Which of the two it is, is told by its length. */
struct event6 {
	struct event event;
	u32 source_address[4];
	u32 address[4];
};

/* Until when the leg may be, in ns of boot time: what an agent that was killed left behind is worth nothing. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 16384);
	MAP_TYPE(key, struct leg_key);
	MAP_TYPE(value, u64);
} legs SEC(".maps");

INLINE int in_agent_net(const u32 *address)
{
	return address[0] == AGENT_NET_0 && address[1] == AGENT_NET_1;
}

INLINE int is_one(const u32 *address)
{
	return address[0] == 0 && address[1] == 0 && address[2] == 0 && address[3] == htonl(1);
}

#endif
