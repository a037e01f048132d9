"""Check what a folder records against this machine: rewards, bit operations, bytes and certificates, some of them measured again.

The folder is that of a search, of finalize.py or of certify_checkpoints.py. Exit code 1 where anything does not hold.
"""

import sys
from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder to check; nothing in it is changed")
    whole = shared_options.whole(0)
    parser.add_argument("--episodes", type=whole, default=3, help="of a search, evaluated again beside the exported one; 0 for all")
    parser.add_argument(
        "--images", type=whole, default=4, help="of each table, certified again; 0 for all, and then missing tables are made, too"
    )
    parser.add_argument("--seed", type=whole, default=0, help="of their choice")
    shared_options.add_engine(parser, "evaluations and images")
    parser.add_argument("--output", type=Path, help="JSON file for the outcome (default: none)")
    return parser.parse_args()


options = command_line.start(__name__, parse)

from dataclasses import asdict

from arq_agents.main import engine_of
from arq_agents.validation import Sample, check_folder
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance


def main(options):
    checks = []
    with engine_of(options) as engine:
        for check in check_folder(options.folder, Sample(options.episodes, options.images, options.seed), engine):
            checks.append(check)
            word = {True: "holds", False: "DOES NOT HOLD", None: "not checked"}[check.holds]
            print(f"{word}: {check.what}" + (f" ({check.told})" if check.told else ""), flush=True)
    if options.output:
        write_json(options.output, {"checks": [asdict(check) for check in checks], "provenance": provenance()})
    if any(check.holds is False for check in checks):
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main, options)
