"""Speed, memory and error of the kernels, compared with plain torch code for the same task.

python -m xprobe_kernels.bench --shape smollm2-135m --json bench.json
"""
