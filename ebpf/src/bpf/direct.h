/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which connections go directly, and their stamps: part of mesh.bpf.c.
 *
 * What is not known to be right goes the way through the agent, or finds no stamp, which the packet programs refuse. */
#ifndef AMBIT_DIRECT_H
#define AMBIT_DIRECT_H

#include "decide.h"
#include "stamps.h"

INLINE struct local *open_local(u32 address, u32 identity)
{
	struct local *l = bpf_map_lookup_elem(&locals, &address);

	return l && l->identity == identity && (l->flags & LOCAL_OPEN) ? l : 0;
}

INLINE u64 *room(void)
{
	u32 index = CONFIG_ROOM;

	return bpf_map_lookup_elem(&config, &index);
}

/* Of an attempt that the tables allow: whether both ends are pods of this node that may speak directly now. A service goes
 * through the agent, which can try another endpoint where one does not answer. */
INLINE int may_go_directly(const struct attempt *a, u64 netns, struct local **caller, struct local **called)
{
	struct namespace *n = bpf_map_lookup_elem(&namespaces, &netns);
	u64 *left = room();

	/* Ports of the agents are nobody's to call (inbound/goal.rs): that is told there. */
	if (a->endpoint_port == CAPTURE_PORT || a->endpoint_port == 15006 || a->endpoint_port == 15008)
		return 0;
	if (!n || !left || (long long)*left <= 0 || a->address != a->endpoint_address || a->port != a->endpoint_port ||
	    n->address == a->endpoint_address)
		return 0;
	*caller = open_local(n->address, a->source);
	*called = open_local(a->endpoint_address, a->destination);
	return *caller && *called && (*caller)->netns == netns && (*called)->netns != netns;
}

/* Asked at connect(): a socket that was bound elsewhere than to the pod's own address goes by loopback, as ever. */
INLINE int goes_directly(const struct bpf_sock *sk, const struct attempt *a, u64 netns)
{
	struct local *caller, *called;
	u32 bound = sk->src_ip4;
	struct namespace *n;

	/* First what most are refused by: the other end is on another node. */
	if (sk->bound_dev_if || !open_local(a->endpoint_address, a->destination))
		return 0;
	n = bpf_map_lookup_elem(&namespaces, &netns);
	if (!n || (bound && bound != n->address))
		return 0;
	return may_go_directly(a, netns, &caller, &called);
}

INLINE void set_key(struct stamp_key *key, const struct stamp *s)
{
	if (s->caller_address < s->called_address) {
		key->lower_address = s->caller_address;
		key->upper_address = s->called_address;
		key->lower_port = s->caller_port;
		key->upper_port = s->called_port;
	} else {
		key->lower_address = s->called_address;
		key->upper_address = s->caller_address;
		key->lower_port = s->called_port;
		key->upper_port = s->caller_port;
	}
}

/* Before the SYN exists. All is judged once more, by what is in force now: with TCP Fast Open the SYN may come long after
 * connect(). The verdict and the stamp are of one run of this program, so that whoever installs other tables, and then
 * looks at the stamps, finds every one that the former tables gave. */
INLINE void stamp(struct bpf_sock_ops *ctx, struct socket_flow *s)
{
	struct attempt a = { .address = ctx->remote_ip4, .port = (u16)ntohl(ctx->remote_port) };
	u64 netns = bpf_get_netns_cookie(ctx), *left = room();
	struct namespace *n = bpf_map_lookup_elem(&namespaces, &netns);
	struct local *caller, *called;
	struct stamp_key key = {};
	struct stamp st = {};

	if (!n || n->address != ctx->local_ip4 || !left)
		return;
	if (identify(&a, s->cgroup) != ALLOWED || a.source != s->source || a.address != s->flow.endpoint_address ||
	    a.port != s->flow.endpoint_port || decide_by_tables(&a, netns) != ALLOWED ||
	    !may_go_directly(&a, netns, &caller, &called))
		return;
	st.caller_netns = netns;
	st.called_netns = called->netns;
	st.opened_ns = bpf_ktime_get_boot_ns();
	st.caller = a.source;
	st.called = a.destination;
	st.caller_address = ctx->local_ip4;
	st.called_address = a.address;
	st.caller_port = (u16)ctx->local_port;
	st.called_port = a.port;
	set_key(&key, &st);
	if (bpf_map_update_elem(&stamps, &key, &st, BPF_ANY)) {
		count(FLOW_LOST);
		return;
	}
	__sync_fetch_and_add(left, -1);
	s->opened_ns = st.opened_ns;
	bpf_sock_ops_cb_flags_set(ctx, (int)(ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG));
}

/* The caller's socket is closed. */
INLINE void retire_stamp(struct bpf_sock_ops *ctx, const struct socket_flow *s)
{
	struct stamp *st = find_stamp(ctx->local_ip4, (u16)ctx->local_port, ctx->remote_ip4, (u16)ntohl(ctx->remote_port));

	if (!st || !s->opened_ns || st->opened_ns != s->opened_ns || st->closed_ns)
		return;
	st->sent = ctx->bytes_acked;
	st->received = ctx->bytes_received;
	st->last_state = ctx->args[0];
	st->closed_ns = bpf_ktime_get_boot_ns();
}

/* The other end, where its listener is governed: once both are closed nothing is owed any more. */
INLINE struct stamp *called_stamp(struct bpf_sock_ops *ctx)
{
	struct stamp *st = find_stamp(ctx->local_ip4, (u16)ctx->local_port, ctx->remote_ip4, (u16)ntohl(ctx->remote_port));

	return st && st->called_address == ctx->local_ip4 && st->called_netns == bpf_get_netns_cookie(ctx) ? st : 0;
}

#endif
