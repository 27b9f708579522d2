/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Connections between two pods of this node, which go from one to the other without the agent. What lets their packets
 * through is a stamp: written by mesh.bpf.c before the SYN exists, honoured by veth.bpf.c and pod.bpf.c, taken away by the
 * agent. No stamp, no packet. ebpf/src/layout.rs says the same in Rust. */
#ifndef AMBIT_STAMPS_H
#define AMBIT_STAMPS_H

#include "ambit.h"

/* After its TCP_CLOSE a flow's last packets pass for so long: acknowledgements, what is sent again, resets. */
#define STAMP_LINGER_NS (60ull * 1000 * 1000 * 1000)

enum local_flags { LOCAL_OPEN = 1 };

/* A pod of this node, all ways out of which are guarded. Without LOCAL_OPEN it begins and takes no new connection directly. */
struct local {
	u64 netns; /* cookie: who gets the address next is somebody else */
	u32 identity;
	u32 device; /* the node's end of its one wire */
	u32 flags;
	u32 pad;
};

/* One for both directions: the end with the lower address first. The two ends are two pods, so the addresses differ. */
struct stamp_key {
	u32 lower_address;
	u32 upper_address;
	u16 lower_port;
	u16 upper_port;
};

struct stamp {
	u64 caller_netns;
	u64 called_netns;
	u64 opened_ns; /* boot time */
	u64 closed_ns; /* the caller's socket; 0 while open */
	u64 called_closed_ns; /* the other one, where it is governed */
	u64 sent; /* by the caller; as TCP counts, once it closed */
	u64 received;
	u32 caller;
	u32 called;
	u32 caller_address;
	u32 called_address;
	u16 caller_port;
	u16 called_port;
	u32 last_state; /* of TCP, before the caller's socket closed */
};

struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1024);
	MAP_TYPE(key, u32); /* address */
	MAP_TYPE(value, struct local);
} locals SEC(".maps");

/* Not LRU: an eviction would end a live flow. Whether there is room is asked before a connection goes directly. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 65536);
	MAP_TYPE(key, struct stamp_key);
	MAP_TYPE(value, struct stamp);
} stamps SEC(".maps");

INLINE struct stamp *find_stamp(u32 address, u16 port, u32 peer, u16 peer_port)
{
	struct stamp_key key = { address, peer, port, peer_port };

	if (address > peer) {
		key.lower_address = peer;
		key.upper_address = address;
		key.lower_port = peer_port;
		key.upper_port = port;
	}
	return bpf_map_lookup_elem(&stamps, &key);
}

#endif
