"""What preparing says at its end: the ledger and whatever else is worth knowing, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sft.ledger import DROPPED


def summary(out_dir: str, meta: Mapping[str, Any]) -> str:
    """The ledger and what else is worth knowing, for people."""
    ledger, lengths = meta["ledger"], meta["lengths"]["all"]
    conversations, tokens, splits = ledger["conversations"], ledger["tokens"], ledger["splits"]
    total = tokens["total"]
    parts = {"trained": tokens["trained"]}
    parts |= {f"masked, {role}": count for role, count in tokens["masked"].items()}
    parts |= {"template": tokens["template"], "repeated history": tokens["repeated_history"], "cut": tokens["cut"]}
    parts |= {f"dropped, {reason.replace('_', ' ')}": count for reason, count in tokens["dropped"].items()}
    dropped = ", ".join(f"{reason.replace('_', ' ')} {conversations[reason]:,}" for reason in DROPPED)
    lines = [
        f"prepared {out_dir}: {conversations['read']:,} conversations, kept {conversations['kept']:,}",
        f"  dropped  {dropped}",
        f"  samples  train {splits['train']['samples']:,}, val {splits['val']['samples']:,}; "
        f"{conversations['shortened']:,} conversations cut to fit, {conversations['expanded']:,} in several samples",
        f"  lengths  min {lengths['min']:,}  median {lengths['median']:,.0f}  mean {lengths['mean']:,.1f}  "
        f"p95 {lengths['p95']:,.0f}  max {lengths['max']:,} tokens",
        "  tokens",
        *(f"    {name:<28} {count:>15,}  {count / total:6.1%}" for name, count in parts.items() if count),
        f"    {'total':<28} {total:>15,}",
    ]
    for name, found in meta["noticed"].items():
        more = ", ..." if found["conversations"] > 3 else ""
        lines.append(f"  {NOTICED[name]}: {found['conversations']:,} conversations")
        lines.append(f"    {', '.join(found['first'][:3])}{more}")
    if meta["leaks"]["conversations"]:
        lines.append(
            f"  validation conversations dropped for being in training: {meta['leaks']['conversations']:,}, the first:"
        )
        lines += [
            f"    {leak['validation']} is {leak['similarity']:.0%} that of {leak['training']}"
            for leak in meta["leaks"]["first"]
        ]
    if bad := ledger["records"]["bad"]:
        lines.append(f"  skipped {bad:,} bad records ({ledger['records']['bad_bytes']:,} bytes), the first:")
        lines += [f"    {problem}" for problem in meta["bad_records"]]
    if meta["settings"]["val_fraction"] > 0 and splits["val"]["samples"] == 0:
        lines.append("  no conversation fell to validation; raise val_fraction to have some")
    audit = meta["audit"]
    lines.append(
        f"  audit    passed: {audit['samples']:,} samples read again, {audit['trained_turns']:,} trained turns are "
        f"their answers, {audit['normalised_turns']:,} of them after the tokenizer's normalisation"
    )
    return "\n".join(lines)


NOTICED = {
    "spells_control": "control tokens spelled in content, kept as ordinary text",
    "empty_turn": "turns without content",
    "user_turns_in_a_row": "two user turns in a row",
    "assistant_first": "an assistant turn first",
    "user_last": "a user turn last, which nothing answers",
    "tail_left_out": "turns after the last trained one, which no sample holds",
    "answer_apart_in_history": "answers in a history whose white space a server would join to their header",
    "nul": "NUL characters",
    "byte_order_mark": "a byte order mark at the beginning of the file",
    "reasoning_not_in_template": "reasoning left out, for which --template=chatml has no place (qwen3 has)",
    "changed_by_template": "text that the template qwen3 leaves out of an answer",
}
