/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* IPv6 of pod.bpf.c. */
#ifndef AMBIT_POD6_H
#define AMBIT_POD6_H

#include "ipv6.h"

INLINE int refuse6(struct bpf_sk_lookup *ctx, u32 reason)
{
	struct event6 *e;

	count(reason);
	if (bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) > bpf_ringbuf_query(&events, BPF_RB_RING_SIZE) / 2)
		e = 0;
	else
		e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(EVENT_LOST);
		return SK_DROP;
	}
	e->event.time_ns = bpf_ktime_get_boot_ns();
	e->event.cgroup = 0;
	e->event.source = 0;
	e->event.destination = 0;
	e->event.source_address = 0;
	e->event.address = 0;
	e->event.port = (u16)ctx->local_port;
	e->event.pad = 0;
	e->event.rule = 0;
	e->event.reason = reason;
	e->event.pad2 = 0;
	COPY_ADDRESS(e->source_address, ctx->remote_ip6);
	COPY_ADDRESS(e->address, ctx->local_ip6);
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
	return SK_DROP;
}

/* The slot's listener takes both families where the pod has addresses of both. */
INLINE int capture6(struct bpf_sk_lookup *ctx)
{
	u32 slot = 0;
	void *sk = bpf_map_lookup_elem(&listener, &slot);
	long failed;

	if (!sk)
		return refuse6(ctx, AGENT_ABSENT);
	failed = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return failed ? refuse6(ctx, AGENT_ABSENT) : SK_PASS;
}

/* What the agent connects to in this very moment. (The kernel gives it the interface of the pod's address, as if from the
 * wire.) */
INLINE int is_leg(struct bpf_sk_lookup *ctx)
{
	struct leg_key key = {};
	u64 *until;

	if (ctx->protocol != IPPROTO_TCP)
		return 0;
	key.netns_cookie = pod.netns;
	COPY_ADDRESS(key.source_address, ctx->remote_ip6);
	COPY_ADDRESS(key.called_address, ctx->local_ip6);
	key.source_port = ntohs(ctx->remote_port);
	key.called_port = (u16)ctx->local_port;
	until = bpf_map_lookup_elem(&legs, &key);
	return until && bpf_ktime_get_boot_ns() < *until;
}

INLINE int inbound6(struct bpf_sk_lookup *ctx)
{
	u32 to[4];

	COPY_ADDRESS(to, ctx->local_ip6);
	/* The kernel drops ::1 from a wire always. */
	if (is_one(to))
		return SK_PASS;
	/* No packet from a wire comes in by lo. */
	if (in_agent_net(to) && ctx->local_port == CAPTURE_PORT && ctx->protocol == IPPROTO_TCP &&
	    ctx->ingress_ifindex == LOOPBACK_IFINDEX)
		return capture6(ctx);
	return is_leg(ctx) ? SK_PASS : refuse6(ctx, PLAIN_INBOUND);
}

#endif
