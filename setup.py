"""Package layout: the folder `triton_kernels` installs as `dgemma_accel.triton_kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dgemma_accel", "dgemma_accel.*"]), "dgemma_accel.triton_kernels"],
    package_dir={"dgemma_accel.triton_kernels": "triton_kernels"},
)
