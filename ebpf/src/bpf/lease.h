/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The agent's numbers, and its lease: until when the kernel may judge by its tables without word of the agent. */
#ifndef AMBIT_LEASE_H
#define AMBIT_LEASE_H

#include "ambit.h"

struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY);
	MAP_INT(max_entries, CONFIG_LEN);
	MAP_TYPE(key, u32);
	MAP_TYPE(value, u64);
} config SEC(".maps");

INLINE u64 config_value(u32 index)
{
	u64 *value = bpf_map_lookup_elem(&config, &index);

	return value ? *value : 0;
}

INLINE int lease_is_over(void)
{
	return bpf_ktime_get_boot_ns() >= config_value(CONFIG_LEASE_NS);
}

#endif
