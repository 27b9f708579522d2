"""Judges a log of Ambit with PyPI's aics-tlog: signed heads, cosignatures, the tree, inclusion and consistency."""

import json
import sys

from aics_tlog import MerkleTree, cosignature_vkey, verify_checkpoint, verify_consistency, verify_leaf_inclusion
from aics_tlog.checkpoint import checkpoint_from_note
from aics_tlog.note import vkey_from_ed25519


def signer(note, keys, make):
    """The one of these keys that the note has a line of."""
    ids = {line.key_id for line in note.signatures}
    return next(key for key in map(make, keys) if key.key_id in ids)


def hashes(texts):
    return [bytes.fromhex(text) for text in texts]


told = json.load(open(sys.argv[1], encoding="utf-8"))
inclusions = consistencies = checkpoints = cosignatures = lies = 0
for part in (told["first"], told["second"]):
    head, note = checkpoint_from_note(part["note"])
    log = lambda key: vkey_from_ed25519(head.origin, bytes.fromhex(key))
    witness = signer(note, part["witness"], lambda key: cosignature_vkey("east/ambit/witness", bytes.fromhex(key)))
    judged = verify_checkpoint(note, signer(note, part["keys"], log), [witness], quorum=1, max_age_seconds=600)
    assert judged.ok, judged
    checkpoints, cosignatures = checkpoints + 1, cosignatures + 1
    tree = MerkleTree(hashes(part["records"]))
    assert (tree.size, tree.root()) == (head.size, head.root), head
    for proof in part["proofs"]:
        newest, newest_note = checkpoint_from_note(proof["checkpoint"])
        assert verify_checkpoint(newest_note, signer(newest_note, part["keys"], log)).ok
        record, path = bytes.fromhex(proof["record"]), hashes(proof["path"])
        assert json.loads(record)["v"] == 1
        assert verify_leaf_inclusion(record, proof["n"], newest.size, path, newest.root), proof
        assert not verify_leaf_inclusion(record + b" ", proof["n"], newest.size, path, newest.root)
        inclusions, lies = inclusions + 1, lies + 1
        if part["old"]:
            old, _ = checkpoint_from_note(part["old"])
            grown = hashes(proof["grown"])
            assert verify_consistency(old.size, newest.size, old.root, newest.root, grown), proof
            assert not verify_consistency(old.size, newest.size, newest.root, newest.root, grown)
            consistencies, lies = consistencies + 1, lies + 1
print(
    f"{inclusions} inclusions, {consistencies} consistencies, {checkpoints} checkpoints, {cosignatures} cosignatures, "
    f"{lies} lies refused"
)
