/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What the programs and the agent share. ebpf/src/layout.rs says the same in Rust; a test compares the two.
 * Addresses are in network order, ports in host order. No structure has hidden padding. */
#ifndef AMBIT_H
#define AMBIT_H

#include "kernel.h"

#define CAPTURE_PORT 15001
#define LOOPBACK_NET 127
#define SERVICE_ENDPOINTS 8

enum config_index {
	CONFIG_LEASE_NS = 0,
	CONFIG_GENERATION = 1,
	CONFIG_SAMPLE = 2,
	CONFIG_ROOM = 3, /* stamps that may still be written */
	CONFIG_TOLD_NS = 4, /* the agent's: of direct connections, what happened until then was told */
	CONFIG_LEN = 5,
};

/* Indexes of `counters` and, for the refusals, the reason of an event. */
enum reason {
	ALLOWED = 0,
	LOOPBACK = 1,
	UNKNOWN_SOURCE = 2,
	LEASE_EXPIRED = 3,
	UNKNOWN_DESTINATION = 4,
	NO_VERDICT = 5,
	POLICY_DENY = 6,
	NO_HEALTHY_ENDPOINT = 7,
	NOT_TCP = 8,
	NATIVE_IPV6 = 9,
	CAPTURE_ADDRESS = 10,
	BOUND_DEVICE = 11,
	NO_TABLES = 12,
	NO_MEMORY = 13,
	PLAIN_INBOUND = 14,
	AGENT_ABSENT = 15,
	NO_CAPTURE = 16,
	EVENT_LOST = 17,
	FLOW_LOST = 18,
	SOCKET_KIND = 19,
	CLEAR_OUTBOUND = 20,
	SOCKET_ENDED = 21,
	DIRECT = 22,
	REASONS = 23,
};

enum action { ACTION_DENY = 0, ACTION_ALLOW = 1 };
enum tier { TIER_LOCAL = 0, TIER_REMOTE = 1, TIERS = 2 };

struct workload {
	u32 identity;
	u32 flags; /* none yet */
};

struct namespace {
	u64 inode; /* for the agent's book-keeping */
	u32 address; /* the pod's */
	u32 pad;
};

struct verdict_key {
	u32 source;
	u32 destination;
	u16 port; /* 0 is every port */
	u16 pad;
};

struct verdict {
	u32 action;
	u32 rule;
};

struct service_key {
	u32 address;
	u16 port;
	u16 pad;
};

struct service_endpoint {
	u32 address;
	u32 identity;
	u16 port;
	u8 tier;
	u8 healthy;
};

struct service {
	u32 count;
	u32 pad;
	struct service_endpoint endpoints[SERVICE_ENDPOINTS];
};

/* A captured flow, as its two ends see it: the accepted socket of the agent has `client` as peer, `capture` as local. */
struct flow_key {
	u64 netns_cookie;
	u32 client_address;
	u32 capture_address;
	u16 client_port;
	u16 pad[3];
};

struct flow {
	u32 asked_address;
	u32 endpoint_address;
	u16 asked_port;
	u16 endpoint_port;
	u32 identity;
	u64 closed_ns; /* boot time; 0 while open */
};

/* Kept with the socket: the flow, and where sockops published it; or, of one that goes directly, who calls, and its stamp. */
struct socket_flow {
	struct flow flow;
	struct flow_key key;
	u64 cgroup;
	u64 opened_ns; /* of the stamp; 0 where there is none */
	u32 source;
	u32 direct;
};

struct event {
	u64 time_ns; /* boot time */
	u64 cgroup;
	u32 source;
	u32 destination;
	u32 source_address; /* of plain inbound and clear outbound only */
	u32 address;
	u16 port;
	u16 pad;
	u32 rule;
	u32 reason;
	u32 pad2;
};

/* Declared by every object, one map on a node. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	MAP_INT(max_entries, REASONS);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, u64);
} counters SEC(".maps");

struct {
	MAP_INT(type, BPF_MAP_TYPE_RINGBUF);
	MAP_INT(max_entries, 256 * 1024);
} events SEC(".maps");

INLINE void count(u32 index)
{
	u64 *counter = bpf_map_lookup_elem(&counters, &index);

	if (counter)
		*counter += 1;
}

/* Something that others than enrolled workloads can cause at will: it may use half of the ring, denials of our own
 * workloads keep the rest. */
INLINE struct event *reserve_half(void)
{
	struct event *e = 0;

	if (bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) <= bpf_ringbuf_query(&events, BPF_RB_RING_SIZE) / 2)
		e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e)
		count(EVENT_LOST);
	return e;
}

INLINE int in_loopback(u32 address)
{
	return (ntohl(address) >> 24) == LOOPBACK_NET;
}

/* Bits of the prefix in host order, as the kernel's trie wants it. */
struct range_key {
	u32 bits;
	u32 address;
};

#endif
