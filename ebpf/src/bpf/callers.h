/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Callers outside of the mesh, whom nothing but their address names. Where a policy lets an address speak to a port of a pod in
 * clear text, what comes from it for that port is the agent's: veth.bpf.c turns it off into the annex (annex.h), where
 * annex.bpf.c gives it to the agent's listener. Both ask here, with each packet or each connection that begins. */
#ifndef AMBIT_CALLERS_H
#define AMBIT_CALLERS_H

#include "lease.h"
#include "ranges.h"
#include "stamps.h"
#include "verdicts.h"

/* Ports that are the mesh's own at every pod, whatever a policy says of every port; as in node-agent/src/inbound/goal.rs. */
enum { PORT_OUTBOUND = 15001, PORT_INBOUND = 15006, PORT_HBONE = 15008 };

/* `port` in host order. The pod is who it was last said to be; of one that is nobody nothing is said. The lease is asked by who asks
 * this: what is open goes on without it, but where the agent says otherwise. */
INLINE int is_let_in(u32 from, const struct local *pod, u16 port)
{
	struct range_key key = { .bits = 32, .address = from };
	struct verdict_key asked = { .destination = pod->identity, .port = port };
	u32 generation, *range, rule = 0;
	void *table;

	if (port == PORT_OUTBOUND || port == PORT_INBOUND || port == PORT_HBONE)
		return 0;
	generation = (u32)config_value(CONFIG_GENERATION);
	table = bpf_map_lookup_elem(&callers, &generation);
	range = table ? bpf_map_lookup_elem(table, &key) : 0;
	if (!range)
		return 0;
	asked.source = *range;
	return verdict_of(asked, generation, &rule) == ALLOWED;
}

#endif
