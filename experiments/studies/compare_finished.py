"""Put finished networks side by side, on the same images and noise.

Each is compared with the FP32 network it was made from, as shipped and as finished by the same recipe (when `finalize.py FP32` is
among the folders), so that a gain from training is not taken for one from bits; the JSON file holds the difference between any
two maps as well. Reads what finalize.py and certify_checkpoints.py left; certifies nothing.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("finals", type=Path, nargs="+", metavar="FOLDER", help="folders that finalize.py wrote")
    parser.add_argument(
        "--references", type=Path, default=Path("experiments/results/references"), help="folder of certify_checkpoints.py"
    )
    parser.add_argument("--n", type=shared_options.whole(1), default=1_000, help="noise samples of the certificates to compare")
    shared_options.add_protocol(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/finals.json"), help="JSON file for the figures; the table goes beside it, as .md"
    )
    return shared_options.by_protocol(parser.parse_args())


options = command_line.start(__name__, parse)

import json
from itertools import combinations

from arq_env import ArqError
from arq_env.certification import Certificates
from arq_env.comparison import lower_bound, paired_difference, paired_ratio
from arq_env.report.tables import finals_table
from arq_env.support.files import atomic_file, write_json
from arq_env.support.provenance import provenance


def main(options):
    which = f"n{options.n}{options.ending}"
    finals = [read(folder, f"summary-{which}", f"certificates-{which}") for folder in options.finals]
    alike = {recipe_of(final): certificates for final, certificates in finals if final["map"] == "FP32"}
    rows = []
    for folder, (final, certificates) in zip(options.finals, finals, strict=True):
        name = name_of(final)
        reference, shipped = read(options.references, f"{name}-{which}", f"{name}-{which}")
        if (reference["digest"], reference["settings"]) != (final["checkpoint"], final["settings"]):
            raise ArqError(f"{folder} was made from other weights than {name}, or certified otherwise: make them alike")
        if not any(row["checkpoint"] == name for row in rows):
            rows.append({"checkpoint": name, "map": "FP32 as shipped", **reference, "bops_fraction": 1.0, "model_bytes": None})
        against = {"shipped": compare(certificates, shipped)}
        if recipe_of(final) in alike:
            against["finished_alike"] = compare(certificates, alike[recipe_of(final)])
        rows.append(final | {"checkpoint": name, "against_fp32": against})
    rows.sort(key=lambda row: (row["checkpoint"], -row["bops_fraction"], row["map"] != "FP32 as shipped"))
    pairs = [
        {"checkpoint": name_of(a), "maps": [a["map"], b["map"]], **compare(of_a, of_b)}
        for (a, of_a), (b, of_b) in combinations(finals, 2)
        if recipe_of(a) == recipe_of(b)
    ]
    write_json(options.output, {"rows": rows, "pairs": pairs, "provenance": provenance()})
    table = finals_table(rows)
    with atomic_file(options.output.with_suffix(".md")) as file:
        file.write(f"{table}\n".encode())
    print(table)


def name_of(final: dict) -> str:
    """The name of the checkpoint that a network was finished from."""
    return f"{final['network']}-{final['dataset']}-sigma{final['sigma']:g}-{final['training']}"


def recipe_of(final: dict) -> str:
    """Base network and recipe of a finished network: what two must share to differ by their bits alone."""
    return json.dumps([final["checkpoint"], final["recipe"], final.get("parts_of_a_batch", 1)], sort_keys=True)


def compare(a: Certificates, b: Certificates) -> dict:
    """Paired difference and ratio of two ACRs, each with its standard error over the images; the ratio's lower 95% bound."""
    (difference, difference_error), (ratio, ratio_error) = paired_difference(a, b), paired_ratio(a, b)
    return {
        "acr_difference": difference,
        "acr_difference_standard_error": difference_error,
        "acr_ratio": ratio,
        "acr_ratio_standard_error": ratio_error,
        "acr_ratio_lower_bound": lower_bound(ratio, ratio_error),
    }


def read(folder: Path, summary: str, certificates: str) -> tuple[dict, Certificates]:
    """A JSON document and a table of certificates from one folder."""
    try:
        return json.loads((folder / f"{summary}.json").read_text()), Certificates.from_tsv(folder / f"{certificates}.tsv")
    except (OSError, ValueError) as error:
        raise ArqError(
            f"{folder} holds no figures to compare ({error}): run finalize.py or certify_checkpoints.py first"
        ) from error


if __name__ == "__main__":
    command_line.run(main, options)
