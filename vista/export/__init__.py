"""Exports of stage 2 that score without vista: ONNX and AOTInductor."""
