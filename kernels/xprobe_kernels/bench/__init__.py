"""Speed, memory and error of the kernels beside what one would write without them. Imported by nothing but its callers.

python -m xprobe_kernels.bench --shape smollm2-135m --json bench.json
"""
