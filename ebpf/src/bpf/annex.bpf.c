// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The program on the agent's annex: who gets a connection that begins there. HBONE has its own listener; what else comes is of
 * callers outside of the mesh, whatever port they ask for, and is the agent's one listener's where a policy lets them in. (What
 * came because its source port is HBONE's was not judged on the pod's wire.) SK_DROP answers as if nothing listened. */
#include "callers.h"

/* The agent's listener. The kernel empties the slot when the agent's socket closes. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_SOCKMAP);
	MAP_INT(max_entries, 1);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, u64);
} strangers SEC(".maps");

SEC("sk_lookup")
int ambit_annex(struct bpf_sk_lookup *ctx)
{
	u32 slot = 0, to = ctx->local_ip4;
	struct local *pod;
	void *sk;
	long failed;

	if (ctx->family != AF_INET || ctx->protocol != IPPROTO_TCP)
		return SK_DROP;
	if (ctx->local_port == PORT_HBONE)
		return SK_PASS;
	pod = bpf_map_lookup_elem(&locals, &to);
	if (!pod || lease_is_over() || !is_let_in(ctx->remote_ip4, pod, (u16)ctx->local_port))
		return SK_DROP;
	sk = bpf_map_lookup_elem(&strangers, &slot);
	if (!sk)
		/* Of the agent that takes over, or comes after, there is another program. */
		return SK_PASS;
	failed = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return failed ? SK_DROP : SK_PASS;
}

char _license[] SEC("license") = "Dual BSD/GPL";
