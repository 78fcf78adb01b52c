# shellcheck shell=bash disable=SC2034
# What tests/gpu/run.sh runs; sourced.
programs=(gpu_saliency_test gpu_select_test gpu_gather_test gpu_rotation_test gpu_conformance_test gpu_ipc_test gpu_nccl_test
  structkv_gpu_bench structkv_overlap_bench structkv-server structkv structkv_wire_bench structkv_wire_count
  structkv_counting_server)
