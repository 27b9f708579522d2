/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The decision itself: who is behind an address, and whether the caller may speak to it. mesh.bpf.c asks it at connect(),
 * decide.bpf.c under BPF_PROG_TEST_RUN, which the kernel has for no connect program. */
#ifndef AMBIT_DECIDE_H
#define AMBIT_DECIDE_H

#include "lease.h"
#include "ranges.h"
#include "verdicts.h"

struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1024);
	MAP_TYPE(key, u64); /* cgroup id */
	MAP_TYPE(value, struct workload);
} workloads SEC(".maps");

/* Two generations of each table, as in verdicts.h. */
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

/* Network namespaces that pod.bpf.c governs: only there does the capture address lead to the agent and nowhere else. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1024);
	MAP_TYPE(key, u64); /* cookie */
	MAP_TYPE(value, struct namespace);
} namespaces SEC(".maps");

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
	u64 cgroup;
};

INLINE void fill_event(struct event *e, const struct attempt *a, u32 reason)
{
	e->time_ns = bpf_ktime_get_boot_ns();
	e->cgroup = a->cgroup;
	e->source = a->source;
	e->destination = a->destination;
	e->source_address = 0;
	e->address = a->address;
	e->port = a->port;
	e->pad = 0;
	e->rule = a->rule;
	e->reason = reason;
	e->pad2 = 0;
}

/* Counts it. Every refusal is told; of what passes one in CONFIG_SAMPLE, none where that is 0. */
INLINE int is_told(u32 reason)
{
	u64 sample;

	count(reason);
	if (reason == LOOPBACK)
		return 0;
	if (reason != ALLOWED)
		return 1;
	sample = config_value(CONFIG_SAMPLE);
	return sample && (sample <= 1 || !(bpf_get_prandom_u32() % (u32)sample));
}

INLINE void record(const struct attempt *a, u32 reason)
{
	struct event *e;

	if (!is_told(reason))
		return;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(EVENT_LOST);
		return;
	}
	fill_event(e, a, reason);
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
}

/* Who calls. Any cgroup below the mesh cgroup that the agent did not enrol may do nothing, not even speak to itself. */
INLINE u32 identify(struct attempt *a, u64 cgroup)
{
	struct workload *w = bpf_map_lookup_elem(&workloads, &cgroup);

	a->cgroup = cgroup;
	if (!w || !w->identity)
		return UNKNOWN_SOURCE;
	a->source = w->identity;
	return ALLOWED;
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
	/* What the mesh knows is never taken for what is outside of it. */
	identity = bpf_map_lookup_elem(endpoint_table, &a->address);
	if (!identity)
		identity = range_of(a->address, generation);
	if (!identity)
		return UNKNOWN_DESTINATION;
	a->destination = *identity;
	a->endpoint_address = a->address;
	a->endpoint_port = a->port;
	return ALLOWED;
}

INLINE u32 judge(struct attempt *a, u32 generation)
{
	const struct verdict_key key = { .source = a->source, .destination = a->destination, .port = a->endpoint_port };

	return verdict_of(key, generation, &a->rule);
}

/* Everything that is decided by tables, of a caller that is known: what decide.bpf.c measures. */
INLINE u32 decide_by_tables(struct attempt *a, u64 netns)
{
	u32 generation, reason;

	if (lease_is_over())
		return LEASE_EXPIRED;
	generation = (u32)config_value(CONFIG_GENERATION);
	reason = resolve(a, generation);
	if (reason != ALLOWED)
		return reason;
	reason = judge(a, generation);
	if (reason != ALLOWED)
		return reason;
	return bpf_map_lookup_elem(&namespaces, &netns) ? ALLOWED : NO_CAPTURE;
}

#endif
