# How long torchrun's agents wait for each other, in seconds. On each node, before torchrun: . conf/torchrun.sh
# (For --flag, where it is not given, torchrun reads PET_FLAG. How long the ranks wait is `timeout` in train.yaml.)
PET_RDZV_CONF=timeout=300,join_timeout=300                                 # for the nodes to come, static and c10d (600)
PET_RDZV_CONF=$PET_RDZV_CONF,last_call_timeout=5                           # elastic: for more than the fewest (30)
PET_RDZV_CONF=$PET_RDZV_CONF,keep_alive_interval=2,keep_alive_max_attempt=5 # a node silent for 2 x 5 is lost (5 x 3)
PET_RDZV_CONF=$PET_RDZV_CONF,read_timeout=20,close_timeout=5               # for an answer of HOST (60, 30)
export PET_RDZV_CONF
