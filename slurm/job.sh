# What all jobs of this folder share. Their scripts source this file and then call one function.
#
# Five minutes before its time limit (--signal in the scripts) a job gets USR1. It interrupts the notebook, which closes
# its journal and its server, and queues itself again under its number. Work in the journal is not repeated. After a
# lost node or a preemption SLURM queues the job again (--requeue).

early='' # a signal that came before there was a command to end
trap 'early=USR1' USR1

# whole NAME...: refuse variables that are no whole number. Bash arithmetic would run a command that stands in one.
whole() {
    local name
    for name in "$@"; do
        case ${!name:-0} in
        *[!0-9]*)
            printf '%s is %q, not a whole number\n' "$name" "${!name}" >&2
            exit 2
            ;;
        esac
    done
}

cd -- "$SLURM_SUBMIT_DIR" || exit 2
if [ ! -f slurm/site.sh ]; then
    echo "no slurm/site.sh in $PWD; submit from the project's folder, after: cp slurm/site.example.sh slurm/site.sh" >&2
    exit 2
fi
source slurm/site.sh
if ! seal_environment || ! command -v seal-nb >/dev/null; then
    echo "seal_environment of slurm/site.sh does not put seal-nb on the PATH; edit it" >&2
    exit 2
fi
whole SLURM_JOB_ID SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_RESTART_COUNT SEAL_MAX_RESTARTS
server_job=${SEAL_SERVER_JOB%_0} # of an array its first task
whole server_job
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# These leave their result in REPLY: `echo` and $(...) change some texts.

# in_runs PATH: its real place. A path in runs/ is in SEAL_RUNS, if that is set.
in_runs() {
    case $1 in
    runs | runs/*) REPLY=${SEAL_RUNS:-runs}${1#runs} ;;
    *) REPLY=$1 ;;
    esac
}

# parameter NAME DEFAULT [-p NAME VALUE]...: its value; the last one given counts.
parameter() {
    local name=$1
    REPLY=$2
    shift 2
    while [ $# -gt 0 ]; do
        if [ "$1" = -p ] && [ $# -gt 2 ]; then
            [ "$2" != "$name" ] || REPLY=$3
            shift 2
        fi
        shift
    done
}

# gpus: the numbers of this job's GPUs on this node, one a line.
gpus() { tr , '\n' <<<"${CUDA_VISIBLE_DEVICES:-}" | sed '/^$/d'; }

# run_stage NOTEBOOK [-p NAME VALUE]...: the executed notebook and the log go to output_dir, named by the job.
run_stage() {
    local notebook=$1 folder
    shift
    parameter output_dir "runs/$notebook" "$@"
    in_runs "$REPLY"
    folder=$REPLY
    log_to "$folder/$notebook-$job.log"
    until_signalled seal-nb run "$notebook" "$@" --output="$folder/$notebook-$job.ipynb"
}

log_to() {
    mkdir -p -- "${1%/*}" || exit 2
    echo "job $job: log in $1"
    exec >>"$1" 2>&1
    echo "job $job on $(uname -n), run $((${SLURM_RESTART_COUNT:-0} + 1))"
}

# until_signalled COMMAND...: run it. USR1 ends it and queues this job again, TERM ends it.
until_signalled() {
    local child watch='' status signalled='' again='' alone=''
    "$@" &
    child=$!
    trap 'signalled=yes; again=yes; kill -TERM "$child"' USR1
    trap 'signalled=yes; alone=yes; kill -TERM "$child"' USR2
    trap 'signalled=yes; kill -TERM "$child"' TERM
    [ -z "$early" ] || kill -s "$early" $$
    if [ -n "${SEAL_SERVER_JOB:-}" ]; then
        parameter endpoint '' "$@"
        in_runs "$REPLY"
        watch_server "${REPLY%/*}" &
        watch=$!
    fi
    wait "$child"
    status=$?
    while [ -n "$signalled" ]; do # a trap ends `wait` early; the second one gives the exit status of the command
        signalled=''
        wait "$child"
        status=$?
    done
    [ -z "$watch" ] || kill "$watch" 2>/dev/null
    [ -z "$alone" ] || echo "job $job: ended, since the server (job $SEAL_SERVER_JOB) has ended; look at its log"
    if [ -n "$again" ] && [ "$status" -ne 0 ]; then queue_again; fi
    exit "$status"
}

# watch_server FOLDER: while the command runs, watch the job of its server (`seal-nb submit` sets SEAL_SERVER_JOB). A
# server that ended because it was idle is started again, also after SLURM has forgotten its job. If it failed or cannot
# be started, USR2 goes to this job's shell.
watch_server() {
    local server=$SEAL_SERVER_JOB started refused=0
    trap - USR1 USR2 TERM
    while sleep "${SEAL_WATCH_S:-60}"; do
        case $(scontrol -o show job "$server" 2>&1) in
        *JobState=PENDING* | *JobState=RUNNING* | *JobState=CONFIGURING* | *JobState=COMPLETING*) ;;
        *JobState=SUSPENDED* | *JobState=REQUEUE*) ;;
        *JobState=COMPLETED* | *'Invalid job id'*)
            if started=$(seal-nb restart-server "$1"); then
                echo "job $job: the server (job $server) had ended; it is started again as job $started"
                server=$started refused=0
            else
                refused=$((refused + 1))
                [ "$refused" -lt 3 ] || { kill -USR2 $$ && return; }
            fi
            ;;
        *JobState=*) kill -USR2 $$ && return ;;
        esac # anything else: the controller does not answer now
    done
}

queue_again() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${SEAL_MAX_RESTARTS:-20}" ]; then
        echo "job $job: not queued again, it was $SLURM_RESTART_COUNT times (SEAL_MAX_RESTARTS in slurm/site.sh)"
        return
    fi
    trap - TERM
    echo "job $job: out of time, queued again"
    for _ in 1 2 3 4 5 6; do # a busy controller may refuse
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this run meanwhile
        sleep 10
    done
}
