"""Write a finished network in the formats that other programs run.

onnx: QuantizeLinear and DequantizeLinear, weights at their bits. integer: ONNX on integers, bit for bit the network. Both are run
and compared with the network before they are kept. qonnx: for FINN and hls4ml. packed: weights packed at their bits. mapping:
bits, levels and steps as JSON. See docs/export.md.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    from arq_env.export.formats import FORMATS

    parser = command_line.parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder of finalize.py, or its network.safetensors")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="what to write")
    parser.add_argument("--base", metavar="MODULE:FUNCTION", help="for a network of your own: returns one of the same structure")
    parser.add_argument(
        "--input-shape",
        type=shared_options.whole(1),
        nargs=3,
        metavar=("C", "H", "W"),
        help="of one image (default: as the run says)",
    )
    parser.add_argument("--output", type=Path, help="folder for the files (default: beside the network)")
    return parser.parse_args()


options = command_line.start(__name__, parse)

from arq_env.export.formats import write_format
from arq_env.export.loading import import_network, input_shape_of, load_with_card


def main(options):
    base = None if options.base is None else import_network(options.base)
    network, card = load_with_card(options.run, base)
    shape = tuple(options.input_shape or input_shape_of(card))
    folder = options.output or (options.run if options.run.is_dir() else options.run.parent)
    for name in options.format:
        path = write_format(name, network, folder, card, shape)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    command_line.run(main, options, resumes=False)
