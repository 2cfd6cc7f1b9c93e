"""Speed, memory and error of the kernels, compared with the code that one would write without them.

python -m xprobe_kernels.bench --shape smollm2-135m --json bench.json
"""
