/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The little of the kernel's user API that these programs use, written out so that an object depends on no header of
 * the machine that builds it: structures as linux/bpf.h lays them out, helpers by their number there. */
#ifndef AMBIT_KERNEL_H
#define AMBIT_KERNEL_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int s32;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define MAP_INT(name, value) int(*name)[value]
#define MAP_TYPE(name, value) typeof(value) *name
#define MAP_ARRAY(name, value) typeof(value) *name[]

#define htons(x) __builtin_bswap16(x)
#define ntohs(x) __builtin_bswap16(x)
#define htonl(x) __builtin_bswap32(x)
#define ntohl(x) __builtin_bswap32(x)

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_ARRAY_OF_MAPS = 12,
	BPF_MAP_TYPE_SOCKMAP = 15,
	BPF_MAP_TYPE_SK_STORAGE = 24,
	BPF_MAP_TYPE_RINGBUF = 27,
};
enum { BPF_ANY = 0 };
enum { BPF_F_NO_PREALLOC = 1 };
enum { BPF_SK_STORAGE_GET_F_CREATE = 1 };
enum { BPF_RB_AVAIL_DATA = 0, BPF_RB_RING_SIZE = 1 };
enum { BPF_RB_NO_WAKEUP = 1 };
enum { SK_DROP = 0, SK_PASS = 1 };
enum { BPF_SOCK_OPS_TCP_CONNECT_CB = 3, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB = 5, BPF_SOCK_OPS_STATE_CB = 10 };
enum { BPF_SOCK_OPS_STATE_CB_FLAG = 1 << 2 };
enum { TCP_SYN_SENT = 2, TCP_CLOSE = 7 };
enum { AF_INET = 2, AF_INET6 = 10 };
enum { ETH_P_IP = 0x0800, ETH_P_ARP = 0x0806 };
enum { TC_ACT_SHOT = 2, TCX_NEXT = -1 };
enum { PACKET_HOST = 0 };
enum { SOCK_STREAM = 1, SOCK_DGRAM = 2 };
enum { IPPROTO_TCP = 6, IPPROTO_UDP = 17, IPPROTO_MPTCP = 262 };
enum { ECONNREFUSED = 111 };
enum { LOOPBACK_IFINDEX = 1 }; /* the kernel gives it to lo in every network namespace */

struct bpf_sock {
	u32 bound_dev_if;
	u32 family;
	u32 type;
	u32 protocol;
	u32 mark;
	u32 priority;
	u32 src_ip4; /* network order */
};

struct bpf_sock_addr {
	u32 user_family;
	u32 user_ip4;    /* network order */
	u32 user_ip6[4]; /* network order */
	u32 user_port;   /* network order in the low half */
	u32 family;
	u32 type;
	u32 protocol;
	u32 msg_src_ip4;
	u32 msg_src_ip6[4];
	union {
		struct bpf_sock *sk;
		u64 : 64;
	} __attribute__((aligned(8)));
};

struct bpf_sock_ops {
	u32 op;
	u32 args[4];
	u32 family;
	u32 remote_ip4; /* network order */
	u32 local_ip4;  /* network order */
	u32 remote_ip6[4];
	u32 local_ip6[4];
	u32 remote_port; /* network order */
	u32 local_port;  /* host order */
	u32 is_fullsock;
	u32 snd_cwnd;
	u32 srtt_us;
	u32 bpf_sock_ops_cb_flags;
	u32 state;
	u32 rtt_min;
	u32 snd_ssthresh;
	u32 rcv_nxt;
	u32 snd_nxt;
	u32 snd_una;
	u32 mss_cache;
	u32 ecn_flags;
	u32 rate_delivered;
	u32 rate_interval_us;
	u32 packets_out;
	u32 retrans_out;
	u32 total_retrans;
	u32 segs_in;
	u32 data_segs_in;
	u32 segs_out;
	u32 data_segs_out;
	u32 lost_out;
	u32 sacked_out;
	u32 sk_txhash;
	u64 bytes_received;
	u64 bytes_acked;
	union {
		struct bpf_sock *sk;
		u64 : 64;
	} __attribute__((aligned(8)));
};

struct sk_buff_view {
	u32 len;
	u32 pkt_type;
	u32 mark;
	u32 queue_mapping;
	u32 protocol; /* network order */
	u32 vlan_present;
	u32 vlan_tci;
	u32 vlan_proto;
	u32 priority;
	u32 ingress_ifindex;
	u32 ifindex;
	u32 tc_index;
	u32 cb[5];
	u32 hash;
	u32 tc_classid;
	u32 data;
	u32 data_end;
	u32 napi_id;
	u32 family;
	u32 remote_ip4;
	u32 local_ip4;
	u32 remote_ip6[4];
	u32 local_ip6[4];
	u32 remote_port;
	u32 local_port;
	u32 data_meta;
	u64 flow_keys;
	u64 tstamp;
	u32 wire_len;
	u32 gso_segs;
	union {
		struct bpf_sock *sk;
		u64 : 64;
	} __attribute__((aligned(8)));
};

struct bpf_sk_lookup {
	u64 cookie;
	u32 family;
	u32 protocol;
	u32 remote_ip4; /* network order */
	u32 remote_ip6[4];
	u16 remote_port; /* network order */
	u16 : 16;
	u32 local_ip4; /* network order */
	u32 local_ip6[4];
	u32 local_port; /* host order */
	u32 ingress_ifindex;
};

_Static_assert(__builtin_offsetof(struct bpf_sock, src_ip4) == 24, "linux/bpf.h");
_Static_assert(__builtin_offsetof(struct bpf_sock_addr, sk) == 64, "linux/bpf.h");
_Static_assert(__builtin_offsetof(struct bpf_sock_ops, sk) == 184, "linux/bpf.h");
_Static_assert(__builtin_offsetof(struct sk_buff_view, sk) == 168, "linux/bpf.h, struct __sk_buff");
_Static_assert(__builtin_offsetof(struct bpf_sk_lookup, local_port) == 60, "linux/bpf.h");

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*const bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static u32 (*const bpf_get_prandom_u32)(void) = (void *)7;
static long (*const bpf_skb_store_bytes)(void *skb, u32 offset, const void *from, u32 len, u64 flags) = (void *)9;
static long (*const bpf_redirect)(u32 ifindex, u64 flags) = (void *)23;
static long (*const bpf_skb_load_bytes)(const void *skb, u32 offset, void *to, u32 len) = (void *)26;
static long (*const bpf_csum_diff)(const void *from, u32 from_size, const void *to, u32 to_size, u32 seed) = (void *)28;
static long (*const bpf_skb_change_type)(void *skb, u32 type) = (void *)32;
static u64 (*const bpf_skb_cgroup_id)(void *skb) = (void *)79;
static long (*const bpf_sock_ops_cb_flags_set)(struct bpf_sock_ops *ctx, int flags) = (void *)59;
static u64 (*const bpf_get_current_cgroup_id)(void) = (void *)80;
static long (*const bpf_sk_release)(void *sock) = (void *)86;
static struct bpf_sock *(*const bpf_sk_fullsock)(struct bpf_sock *sk) = (void *)95;
static void *(*const bpf_sk_storage_get)(void *map, void *sk, void *value, u64 flags) = (void *)107;
static long (*const bpf_sk_storage_delete)(void *map, void *sk) = (void *)108;
static u64 (*const bpf_get_netns_cookie)(void *ctx) = (void *)122;
static long (*const bpf_sk_assign)(void *ctx, void *sk, u64 flags) = (void *)124;
static u64 (*const bpf_ktime_get_boot_ns)(void) = (void *)125;
static void *(*const bpf_ringbuf_reserve)(void *ringbuf, u64 size, u64 flags) = (void *)131;
static void (*const bpf_ringbuf_submit)(void *data, u64 flags) = (void *)132;
static u64 (*const bpf_ringbuf_query)(void *ringbuf, u64 flags) = (void *)134;
static long (*const bpf_redirect_peer)(u32 device, u64 flags) = (void *)155;
static int (*const bpf_set_retval)(int retval) = (void *)187;

#endif
