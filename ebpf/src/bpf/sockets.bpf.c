// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Run in a pod's network namespace whenever it begins to be governed: ends the TCP connections that are there and go by the
 * wire. In a governed namespace no connection that is allowed has both ends beyond loopback, but what goes directly to a pod
 * of this node, or comes from one: that has its stamp. */
#include "ambit.h"
#include "stamps.h"

#define BY_NAME __attribute__((preserve_access_index))

enum { TCP_TIME_WAIT = 6, TCP_LISTEN = 10 };

/* Of the running kernel's own types: the loader finds these fields by name in its BTF. */
struct in6_addr {
	union {
		u32 u6_addr32[4];
	} in6_u;
} BY_NAME;

struct sock_common {
	u32 skc_daddr;
	u32 skc_rcv_saddr;
	u16 skc_dport;
	u16 skc_num;
	u16 skc_family;
	volatile u8 skc_state;
	struct in6_addr skc_v6_daddr;
} BY_NAME;

struct bpf_iter__tcp {
	struct sock_common *sk_common;
} BY_NAME;

extern int bpf_sock_destroy(struct sock_common *sk) SEC(".ksyms");

INLINE int is_by_loopback(const struct sock_common *sk)
{
	const u32 *to = sk->skc_v6_daddr.in6_u.u6_addr32;

	/* The agent's last leg has its near end there, the workload's the far one. */
	if (sk->skc_family == AF_INET)
		return in_loopback(sk->skc_daddr) || in_loopback(sk->skc_rcv_saddr);
	if (to[0] || to[1])
		return 0;
	return (to[2] == htonl(0xffff) && in_loopback(to[3])) || (to[2] == 0 && to[3] == htonl(1));
}

INLINE int is_stamped(const struct sock_common *sk)
{
	return !!find_stamp(sk->skc_rcv_saddr, sk->skc_num, sk->skc_daddr, ntohs(sk->skc_dport));
}

SEC("iter/tcp")
int ambit_end_bypassing(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	u8 state;

	if (!sk)
		return 0;
	state = sk->skc_state;
	if (state == TCP_LISTEN || state == TCP_CLOSE || state == TCP_TIME_WAIT || is_by_loopback(sk) ||
	    is_stamped(sk))
		return 0;
	if (!bpf_sock_destroy(sk))
		count(SOCKET_ENDED);
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
