/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Who may speak to whom, by numbers and port. */
#ifndef AMBIT_VERDICTS_H
#define AMBIT_VERDICTS_H

#include "ambit.h"

/* Two generations of each table; config[CONFIG_GENERATION] says which is in force. The agent fills fresh inner maps,
 * puts them into the idle slots, then flips the one number: no program ever mixes two sets. (Sizes, not types: clang
 * keeps no type that only an inner map names.) */
struct verdict_table {
	MAP_INT(type, BPF_MAP_TYPE_HASH);
	MAP_INT(max_entries, 1);
	MAP_INT(key_size, sizeof(struct verdict_key));
	MAP_INT(value_size, sizeof(struct verdict));
};
struct {
	MAP_INT(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	MAP_INT(max_entries, 2);
	MAP_TYPE(key, u32);
	MAP_ARRAY(values, struct verdict_table);
} verdicts SEC(".maps");

/* Deny wins over allow, exact port and every port alike; nothing is a deny. */
INLINE u32 verdict_of(struct verdict_key key, u32 generation, u32 *rule)
{
	void *table = bpf_map_lookup_elem(&verdicts, &generation);
	struct verdict *exact, *any;

	if (!table)
		return NO_TABLES;
	exact = bpf_map_lookup_elem(table, &key);
	key.port = 0;
	any = bpf_map_lookup_elem(table, &key);
	if (exact && exact->action != ACTION_ALLOW) {
		*rule = exact->rule;
		return POLICY_DENY;
	}
	if (any && any->action != ACTION_ALLOW) {
		*rule = any->rule;
		return POLICY_DENY;
	}
	if (!exact && !any)
		return NO_VERDICT;
	*rule = exact ? exact->rule : any->rule;
	return ALLOWED;
}

#endif
