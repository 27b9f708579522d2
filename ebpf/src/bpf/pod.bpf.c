// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The program on one pod's network namespace: what may reach a listening socket there. SK_DROP answers as if nothing
 * listened, so a TCP client is refused at once. */
#include "ambit.h"
#include "stamps.h"

/* Set by the agent for this pod before the program is loaded: its address, in network order, and its namespace's cookie. */
const volatile struct {
	u32 address;
	u32 pad;
	u64 netns;
} pod;

/* The agent's capture listener in this namespace. The kernel empties the slot when the agent's socket closes. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_SOCKMAP);
	MAP_INT(max_entries, 1);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, u64);
} listener SEC(".maps");

INLINE int refuse(struct bpf_sk_lookup *ctx, u32 reason)
{
	struct event *e;

	count(reason);
	e = reserve_half();
	if (!e)
		return SK_DROP;
	e->time_ns = bpf_ktime_get_boot_ns();
	e->cgroup = 0;
	e->source = 0;
	e->destination = 0;
	e->source_address = ctx->remote_ip4;
	e->address = ctx->local_ip4;
	e->port = (u16)ctx->local_port;
	e->pad = 0;
	e->rule = 0;
	e->reason = reason;
	e->pad2 = 0;
	bpf_ringbuf_submit(e, BPF_RB_NO_WAKEUP);
	return SK_DROP;
}

INLINE int capture(struct bpf_sk_lookup *ctx)
{
	u32 slot = 0;
	void *sk = bpf_map_lookup_elem(&listener, &slot);
	long failed;

	if (!sk)
		return refuse(ctx, AGENT_ABSENT);
	failed = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return failed ? refuse(ctx, AGENT_ABSENT) : SK_PASS;
}

#include "pod6.h"

/* The kernel drops 127/8 from a wire as martian only while route_localnet is off, which is the pod's to change. But no
 * packet from a wire comes in by lo, nor has one from here to 127/8 another way in. */
INLINE int is_to_loopback4(const struct bpf_sk_lookup *ctx)
{
	return in_loopback(ctx->local_ip4) && ctx->ingress_ifindex == LOOPBACK_IFINDEX;
}

/* What another pod of this node has just been allowed. (A packet that only says so does not come as far: veth.bpf.c.) */
INLINE int is_stamped(const struct bpf_sk_lookup *ctx)
{
	struct stamp *s;

	if (ctx->protocol != IPPROTO_TCP || ctx->local_ip4 != pod.address)
		return 0;
	s = find_stamp(ctx->remote_ip4, ntohs(ctx->remote_port), ctx->local_ip4, (u16)ctx->local_port);
	return s && s->called_address == ctx->local_ip4 && s->called_netns == pod.netns && !s->closed_ns;
}

/* A socket of the agent in this namespace, source 127.x.y.z, to the pod's own address. (The kernel gives these the
 * interface of that address, as if from the wire.) TCP alone: whoever forges such a source sees no answer, hence gets no
 * connection, but a datagram would have arrived. */
INLINE int is_last_leg(const struct bpf_sk_lookup *ctx)
{
	return ctx->local_ip4 == pod.address && in_loopback(ctx->remote_ip4) && ctx->protocol == IPPROTO_TCP;
}

SEC("sk_lookup")
int ambit_inbound(struct bpf_sk_lookup *ctx)
{
	if (ctx->family != AF_INET)
		return inbound6(ctx);
	if (is_to_loopback4(ctx)) {
		/* A captured socket may have been bound to the pod's address before. */
		if (ctx->local_port == CAPTURE_PORT && ctx->protocol == IPPROTO_TCP &&
		    (in_loopback(ctx->remote_ip4) || ctx->remote_ip4 == pod.address))
			return capture(ctx);
		if (in_loopback(ctx->remote_ip4))
			return SK_PASS;
	}
	return is_last_leg(ctx) || is_stamped(ctx) ? SK_PASS : refuse(ctx, PLAIN_INBOUND);
}

char _license[] SEC("license") = "Dual BSD/GPL";
