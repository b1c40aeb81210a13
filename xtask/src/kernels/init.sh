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
