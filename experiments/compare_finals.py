"""Put finished networks side by side: each against the FP32 network it was made from, on the same images and noise.

Reads what finalize.py and certify_checkpoints.py left; certifies nothing.
"""

import json
from pathlib import Path

from arq_env import ArqError, command_line
from arq_env.certification import Certificates
from arq_env.comparison import paired_difference
from arq_env.files import write_json
from arq_env.provenance import provenance
from arq_env.report import finals_table


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("finals", type=Path, nargs="+", metavar="FOLDER", help="folders that finalize.py wrote")
    parser.add_argument(
        "--references", type=Path, default=Path("experiments/results/references"), help="folder of certify_checkpoints.py"
    )
    parser.add_argument("--n", type=command_line.whole(1), default=1_000, help="noise samples of the certificates to compare")
    parser.add_argument("--output", type=Path, default=Path("runs/finals.json"), help="JSON file for the figures")
    return parser.parse_args()


def main():
    options = parse()
    rows = []
    for folder in options.finals:
        final, certificates = read(folder, f"summary-n{options.n}", f"certificates-n{options.n}")
        name = f"{final['network']}-{final['dataset']}-sigma{final['sigma']:g}-{final['training']}"
        reference, shipped = read(options.references, f"{name}-n{options.n}", f"{name}-n{options.n}")
        if (reference["digest"], reference["settings"]) != (final["checkpoint"], final["settings"]):
            raise ArqError(f"{folder} was made from other weights than {name}, or certified otherwise: make them alike")
        if not any(row["checkpoint"] == name for row in rows):
            rows.append({"checkpoint": name, "map": "FP32 as shipped", "bops_fraction": 1.0, **reference})
        difference, error = paired_difference(certificates, shipped)
        compared = {"acr_ratio": final["acr"] / reference["acr"], "acr_difference": difference, "difference_standard_error": error}
        rows.append(final | {"checkpoint": name} | compared)
    rows.sort(key=lambda row: (row["checkpoint"], -row["bops_fraction"], row["map"] != "FP32 as shipped"))
    write_json(options.output, {"rows": rows, "provenance": provenance()})
    print(finals_table(rows))


def read(folder: Path, summary: str, certificates: str) -> tuple[dict, Certificates]:
    """A JSON document and a table of certificates from one folder."""
    try:
        return json.loads((folder / f"{summary}.json").read_text()), Certificates.from_tsv(folder / f"{certificates}.tsv")
    except (OSError, ValueError) as error:
        raise ArqError(
            f"{folder} holds no figures to compare ({error}): run finalize.py or certify_checkpoints.py first"
        ) from error


if __name__ == "__main__":
    command_line.run(main)
