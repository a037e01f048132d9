"""Networks for deployment: files that other programs run, and the same files as classifiers to certify.

:mod:`arq_env.export.packed` needs nothing more than the package does; ONNX and QONNX need the extra ``export``. Quantization and
certification do not know this package.
"""
