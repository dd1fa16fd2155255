# What the jobs of this folder have in common; sourced by their scripts, after which one function is called.
#
# Before its time limit (--signal of the scripts) a job gets USR1: the notebook is interrupted, closes its journal and
# its server, and the job is queued again under its number. What the journal holds is not done again. After a lost node
# or a preemption SLURM queues the job again by itself (--requeue).

cd "$SLURM_SUBMIT_DIR" || exit 2
if [ ! -f slurm/site.sh ]; then
    echo "no slurm/site.sh in $PWD; submit from the project's folder, after: cp slurm/site.example.sh slurm/site.sh" >&2
    exit 2
fi
source slurm/site.sh
if ! seal_environment || ! command -v seal-nb >/dev/null; then
    echo "seal_environment of slurm/site.sh does not put seal-nb on the PATH; edit it" >&2
    exit 2
fi
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# parameter NAME DEFAULT [-p NAME VALUE]...: its value, the last one given.
parameter() {
    local name=$1 value=$2
    shift 2
    while [ $# -gt 0 ]; do
        if [ "$1" = -p ] && [ "${2:-}" = "$name" ]; then value=${3:-}; fi
        shift
    done
    echo "$value"
}

# gpus: the numbers of the GPUs of this job on this node, one a line.
gpus() { tr , '\n' <<<"${CUDA_VISIBLE_DEVICES:-}" | sed '/^$/d'; }

# run_stage NOTEBOOK [-p NAME VALUE]...: executed notebook and log lie in output_dir, named by the job.
run_stage() {
    local notebook=$1 folder
    shift
    folder=$(parameter output_dir "runs/$notebook" "$@")
    log_to "$folder/$notebook-$job.log"
    until_signalled seal-nb run "$notebook" "$@" --output "$folder/$notebook-$job.ipynb"
}

log_to() {
    mkdir -p "$(dirname "$1")" || exit 2
    echo "job $job: log in $1"
    exec >>"$1" 2>&1
    echo "job $job on $(uname -n), run $((${SLURM_RESTART_COUNT:-0} + 1))"
}

# until_signalled COMMAND...: run it; at USR1 end it and queue this job again, at TERM end it.
until_signalled() {
    local child watch='' status signalled='' again='' alone=''
    trap 'signalled=yes; again=yes; kill -TERM "$child"' USR1
    trap 'signalled=yes; alone=yes; kill -TERM "$child"' USR2
    trap 'signalled=yes; kill -TERM "$child"' TERM
    "$@" &
    child=$!
    if [ -n "${SEAL_SERVER_JOB:-}" ]; then
        watch_server &
        watch=$!
    fi
    wait "$child"
    status=$?
    while [ -n "$signalled" ]; do # a trap ends `wait` early; asked again, it tells how the command ended
        signalled=''
        wait "$child"
        status=$?
    done
    [ -z "$watch" ] || kill "$watch" 2>/dev/null
    [ -z "$alone" ] || echo "job $job: ended, since the server (job $SEAL_SERVER_JOB) has ended; look at its log"
    if [ -n "$again" ] && [ "$status" -ne 0 ]; then queue_again; fi
    exit "$status"
}

# While the command runs, look after the job of the server that it asks (seal-nb submit names it): one that ended for
# want of clients is queued again, since here is one; if it has failed or is gone, USR2 goes to this job's shell.
watch_server() {
    local refused=0
    trap - USR1 USR2 TERM
    while sleep "${SEAL_WATCH_S:-60}"; do
        case $(scontrol -o show job "$SEAL_SERVER_JOB" 2>&1) in
        *JobState=PENDING* | *JobState=RUNNING* | *JobState=CONFIGURING* | *JobState=COMPLETING*) ;;
        *JobState=SUSPENDED* | *JobState=REQUEUE*) ;;
        *JobState=COMPLETED*)
            scontrol requeue "${SEAL_SERVER_JOB%_*}" || refused=$((refused + 1)) # another client may have been faster
            [ "$refused" -lt 3 ] || { kill -USR2 $$ && return; }
            ;;
        *JobState=* | *'Invalid job id'*) kill -USR2 $$ && return ;;
        esac # else the controller cannot be asked now
    done
}

queue_again() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${SEAL_MAX_RESTARTS:-20}" ]; then
        echo "job $job: not queued again, it was $SLURM_RESTART_COUNT times (SEAL_MAX_RESTARTS in slurm/site.sh)"
        return
    fi
    trap - USR1 TERM
    echo "job $job: out of time, queued again"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this run meanwhile
}
