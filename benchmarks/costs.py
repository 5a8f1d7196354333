"""What photos cost, from a measured rate and from prices that you give.

The rate of a vCPU is measured (docs/scaling.md). Prices, the exchange rate and their date are
inputs: the defaults are round examples, not anybody's price list. No GPU was measured, so its line
is shown only with a rate of your own, and says so.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from common import parser, start, table, write_figures

EXTRACT = 103.0
"""Photos per second and vCPU, measured: docs/scaling.md, "What follows"."""

AFTERWARDS = 64e-6 + 170e-6
"""Seconds of a vCPU for each photo, writing the table and in reduce, measured there too."""

REQUESTS = 2
"""To the object store for each photo: pyarrow asks its size, then its bytes."""


@dataclass(frozen=True)
class Prices:
    """In US dollars, but for the exchange rate."""

    vcpu_hour: float
    gb_hour: float
    gpu_hour: float
    thousand_reads: float
    eur_per_usd: float


@dataclass(frozen=True)
class Bill:
    """What a number of photos takes and costs."""

    hours: float
    compute: float
    reads: float

    @property
    def total(self) -> float:
        """EUR in all."""
        return self.compute + self.reads


def cpu(photos: float, prices: Prices, rate: float, gb: float, used: float) -> Bill:
    """Return hours of a vCPU and EUR.

    Parameters
    ----------
    rate
        Photos per second and vCPU.
    gb
        Memory that is paid for beside each vCPU.
    used
        The share of the paid time in which photos are computed.

    >>> prices = Prices(0.06, 0.0, 1.0, 0.0, 1.0)
    >>> bill = cpu(3_600_000, prices, rate=1 / (0.01 - AFTERWARDS), gb=2, used=0.5)
    >>> round(bill.hours, 6), round(bill.total, 6)
    (20.0, 1.2)
    """
    hours = photos * (1 / rate + AFTERWARDS) / 3600 / used
    dollars = hours * (prices.vcpu_hour + gb * prices.gb_hour)
    return Bill(hours, dollars * prices.eur_per_usd, _reads(photos, prices))


def gpu(photos: float, prices: Prices, rate: float, used: float) -> Bill:
    """Return hours of a GPU's machine and EUR, at a rate that was not measured here.

    >>> prices = Prices(0.06, 0.0, 2.0, 0.0, 0.5)
    >>> gpu(3_600_000, prices, rate=1000, used=1.0).total
    1.0
    """
    hours = photos / rate / 3600 / used
    return Bill(hours, hours * prices.gpu_hour * prices.eur_per_usd, _reads(photos, prices))


def _reads(photos: float, prices: Prices) -> float:
    return photos * REQUESTS / 1000 * prices.thousand_reads * prices.eur_per_usd


def main() -> int:
    """Print the table."""
    given = _arguments()
    prices = Prices(
        given.vcpu_hour, given.gb_hour, given.gpu_hour, given.thousand_reads, given.eur_per_usd
    )
    bills = {
        f"CPU, {given.rate:g} photos/s for each vCPU (measured)": cpu(
            given.photos, prices, given.rate, given.gb, given.used
        )
    }
    if given.gpu_rate:
        name = f"GPU, {given.gpu_rate:g} photos/s (not measured here)"
        bills[name] = gpu(given.photos, prices, given.gpu_rate, given.used)
    head = (
        f"{given.photos / 1e6:g} million photos",
        "vCPU or GPU hours",
        "compute EUR",
        "reads EUR",
        "EUR",
    )
    rows = [
        (name, *(f"{value:.2f}" for value in (bill.hours, bill.compute, bill.reads, bill.total)))
        for name, bill in bills.items()
    ]
    print(table(head, rows))
    print(
        f"\nInputs, {given.price_date}: {prices.vcpu_hour:g} USD for a vCPU hour, "
        f"{prices.gb_hour:g} for a GB hour ({given.gb:g} GB for each vCPU),\n"
        f"{prices.gpu_hour:g} for an hour of a machine with a GPU, {prices.thousand_reads:g} for "
        f"1000 reads; {prices.eur_per_usd:g} EUR for a USD;\n"
        f"{given.used:.0%} of the paid time computes. Storage and the driver are not in it."
    )
    if not given.gpu_rate:
        print("No line for a GPU: none was measured. Give a rate of yours as --gpu-rate.")
    write_figures(given.json, {"inputs": vars(given) | {"json": None}, "bills": _plain(bills)})
    return 0


def _plain(bills: dict[str, Bill]) -> dict[str, dict[str, float]]:
    return {name: {**vars(bill), "total": bill.total} for name, bill in bills.items()}


def _arguments() -> argparse.Namespace:
    found = parser(__doc__)

    def number(name: str, default: float, text: str) -> None:
        found.add_argument(
            name,
            type=_positive,
            default=default,
            metavar="N",
            help=f"{text} (default: {default:g})",
        )

    number("--photos", 1_000_000, "how many photos")
    number("--rate", EXTRACT, "photos per second and vCPU in extract: measured here")
    number("--used", 0.8, "share of the paid time in which photos are computed: an example")
    number("--vcpu-hour", 0.06, "USD for a vCPU hour: an example")
    number("--gb-hour", 0.006, "USD for a GB hour: an example; 0.0000001 where it is included")
    number("--gb", 2, "GB paid for beside each vCPU: what `pomona cloud emr submit` asks for")
    number("--gpu-hour", 1.0, "USD for an hour of a machine with one GPU: an example")
    number("--thousand-reads", 0.0005, "USD for 1000 reads of the object store: an example")
    number("--eur-per-usd", 0.9, "EUR for a USD: an example")
    found.add_argument(
        "--gpu-rate", type=_positive, metavar="N", help="photos per second of one GPU, of your own"
    )
    found.add_argument(
        "--price-date",
        metavar="DATE",
        default="round examples of 2026-11-24, no price list",
        help="when, and from where, your prices are",
    )
    return found.parse_args()


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    start(main)
