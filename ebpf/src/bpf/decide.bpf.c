// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The decision of mesh.bpf.c where BPF_PROG_TEST_RUN can time it: loaded by the benchmark alone, attached nowhere. */
#include "decide.h"

/* Addresses 10.0.0.0 + n, n below `span`: `window` of them, spread over it, in an order that no cache foresees. Both are
 * powers of two, set before loading. */
const volatile u32 span = 1;
const volatile u32 window = 1;
const volatile u64 caller_cgroup;
const volatile u64 caller_netns;

u32 turn;

SEC("tc")
int ambit_nothing(struct sk_buff_view *skb __attribute__((unused)))
{
	return 0;
}

SEC("tc")
int ambit_decide(struct sk_buff_view *skb __attribute__((unused)))
{
	u32 n = ((++turn * 0x9e3779b1u >> 7) & (window - 1)) * (span / window);
	struct attempt a = { .address = htonl(0x0a000000 + n), .port = 443 };
	u32 reason = identify(&a, caller_cgroup);

	if (reason == ALLOWED)
		reason = decide_by_tables(&a, caller_netns);
	record(&a, reason);
	return (int)reason;
}

char _license[] SEC("license") = "Dual BSD/GPL";
