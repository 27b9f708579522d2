/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Ranges of addresses outside of the mesh: what stands behind an address that is no service and no endpoint. */
#ifndef AMBIT_RANGES_H
#define AMBIT_RANGES_H

#include "ambit.h"

enum { BPF_MAP_TYPE_LPM_TRIE = 11 };

/* By longest prefix. Its number is one that no workload has, and stands in the verdict table as any destination's does. */
struct range_table {
	MAP_INT(type, BPF_MAP_TYPE_LPM_TRIE);
	MAP_INT(max_entries, 1);
	MAP_INT(map_flags, BPF_F_NO_PREALLOC);
	MAP_INT(key_size, sizeof(struct range_key));
	MAP_INT(value_size, sizeof(u32)); /* number */
};
struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	MAP_INT(max_entries, 2);
	MAP_TYPE(key, u32);
	MAP_ARRAY(values, struct range_table);
} ranges SEC(".maps");

/* Of callers outside of the mesh (callers.h), in the same way. Addresses that the mesh knows are among them, under a number of which
 * no verdict speaks. */
struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	MAP_INT(max_entries, 2);
	MAP_TYPE(key, u32);
	MAP_ARRAY(values, struct range_table);
} callers SEC(".maps");

/* The number of the longest range that holds the address; null for none. */
INLINE u32 *range_of(u32 address, u32 generation)
{
	struct range_key key = { .bits = 32, .address = address };
	void *table = bpf_map_lookup_elem(&ranges, &generation);

	return table ? bpf_map_lookup_elem(table, &key) : 0;
}

#endif
