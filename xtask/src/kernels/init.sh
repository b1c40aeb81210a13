#!/bin/sh
# The first process of a Debian guest. Builtins where they do: each fork costs a guest under shadow paging.
echo "umbra-init: first line"
export PATH=/bin HOME=/root TERM=linux
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
name=guest
script=
read -r words < /proc/cmdline
for word in $words; do
    case $word in
    hostname=*) name=${word#hostname=} ;;
    umbra.script) script=1 ;;
    esac
done
if [ -n "$script" ]; then
    uname -a
    while read -r key value unit; do
        if [ "$key" = MemTotal: ]; then
            echo "memory: $value $unit"
            break
        fi
    done < /proc/meminfo
    processors=0
    while read -r key rest; do
        if [ "$key" = processor ]; then processors=$((processors + 1)); fi
    done < /proc/cpuinfo
    echo "processors: $processors"
    # On several: as many shells fork at once, two for each, and all must come to the same.
    if [ $processors -gt 1 ]; then
        worker=0
        while [ $worker -lt $((2 * processors)) ]; do
            (
                sum=0
                turn=0
                while [ $turn -lt 12 ]; do
                    sum=$((sum * 31 % 65521 + $(echo $((turn * turn)))))
                    turn=$((turn + 1))
                done
                read -r digest rest <<EOF
$(md5sum /bin/busybox)
EOF
                echo "$sum $digest" > /root/worker$worker
            ) &
            worker=$((worker + 1))
        done
        wait
        read -r first < /root/worker0
        agree=0
        for file in /root/worker*; do
            read -r line < $file
            if [ "$line" = "$first" ]; then agree=$((agree + 1)); fi
        done
        echo "workers: $agree of $worker agree on ${first%% *}"
    fi
    md5sum /bin/busybox
    echo "6 * 7 = $((6 * 7))"
    echo "umbra-init: script done"
    poweroff -f
fi
export PS1="$name:~# "
cd /root
echo "umbra-init: shell; exit powers off"
setsid cttyhack sh
poweroff -f
