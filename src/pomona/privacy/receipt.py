"""The receipt of a forget: what was erased and made again, without a path."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from pomona.core.files import FORMAT, read_json, write_json
from pomona.core.provenance import utc_now
from pomona.privacy.copies import Copies
from pomona.privacy.occurrences import Occurrences
from pomona.workspace import feature_table
from pomona.workspace.layout import Out


def open_receipt(
    out: Out,
    pending: dict[str, Any],
    occurrences: Occurrences,
    files: Counter[str],
    copies: Copies,
) -> dict[str, Any]:
    """Return the receipt of photos that are about to be erased; ``finished`` is null."""
    from pomona import __version__

    return {
        "format": FORMAT,
        "pomona": __version__,
        "finished": None,
        "erased": utc_now(),
        "photos": len(pending["ids"]),
        "tombstones": pending["ids"],
        "tombstones_added": pending["added"],
        "rows": occurrences.counts,
        "files": dict(files),
        "copies": asdict(copies),
        "made_again": {},
        "export_removed": occurrences.in_derived and (out.root / "export").exists(),
        "digests": {"before": digests(out)},
    }


def close_receipts(
    out: Out, pending: dict[str, Any], made_again: dict[str, str], unnamed: set[str]
) -> list[str]:
    """Complete the receipts of a forget.

    Parameters
    ----------
    unnamed
        Tombstones of photos whose names could not be cleaned: their receipts stay open.

    Returns
    -------
    list of str
        The receipts that stay open.
    """
    still_open = []
    for name in pending["receipts"]:
        receipt = read_json(out.forgotten / name)
        if not receipt:  # somebody removed it
            continue
        receipt["made_again"] |= made_again
        receipt["digests"]["after"] = digests(out)
        if unnamed.intersection(receipt["tombstones"]):
            still_open.append(name)
        else:
            receipt["finished"] = utc_now()
        write_json(out.forgotten / name, receipt)
    return still_open


def digests(out: Out) -> dict[str, str]:
    """Return the digests of the tables, the projection and the model."""
    stages = read_json(out.manifest).get("stages", {})
    made = [stages.get(stage, {}).get("digests", {}) for stage in ("reduce", "train")]
    return {"features": feature_table.digest(out), **made[0], **made[1]}
