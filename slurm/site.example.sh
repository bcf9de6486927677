# Settings of one cluster, sourced by every job (slurm.site). Copy it, keep what applies.

# Environment: what `movienet-shard --help` needs to run on a compute node.
# module load Python/3.11 CUDA/12
# source "$HOME/venvs/movienet/bin/activate"

# Node-local scratch for temporary frames and the shard cache, unless the site sets SLURM_TMPDIR.
# export SLURM_TMPDIR=/local/$SLURM_JOB_ID

# Network between nodes. `movienet-slurm doctor` shows which of these are needed.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0   # where a node's own name means 127.0.1.1 (Debian's default)
# export NCCL_DEBUG=WARN
# ADDRESS_SUFFIX=i                # appended to host names, as on JUWELS

# Nodes without internet.
# export HF_HUB_OFFLINE=1 WANDB_MODE=offline
