/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* HBONE of a pod: TCP to or from port 15008 of its address. It is the agent's, never the pod's: what comes by the pod's wire
 * turns off before it, into the annex, a network namespace that only the agent has sockets in. The agent's answers come out
 * of the annex and not by the pod's wire, so nobody in the pod sees, takes or changes a packet of these, whatever it may do
 * to its own devices; and where the agent is dead there is no annex, and nothing comes in. */
#ifndef AMBIT_ANNEX_H
#define AMBIT_ANNEX_H

#include "ambit.h"

enum { HBONE_PORT = 15008 };

/* The caller has checked that the packet is whole and to the pod's address. `index` is the annex's device on the node; one
 * that went with its agent has no number that is used again, and the kernel drops the packet. */
INLINE int into_annex(struct sk_buff_view *skb, u32 index)
{
	/* 02:61:6d:62:69:74, of both ends of the annex's veth: with one address for both, neither asks for the other's.
	 * ebpf/src/annex.rs sets it. (A number: constants in memory are the agent's to set.) */
	const u64 mac = 0x7469626d6102;

	if (bpf_skb_store_bytes(skb, 0, &mac, 6, 0))
		return TC_ACT_SHOT;
	return (int)bpf_redirect(index, 0);
}

#endif
