# `cargo demo -- --window`: the guest draws a page on its console, then waits.
exec 3> /dev/tty1
echo 0 > /sys/class/graphics/fbcon/cursor_blink
echo 1 > /proc/sys/kernel/printk
say() { printf '%b' "$1" >&3; }
# Colours 1 to 6 become those of the panes.
say '\033]P1d1495b\033]P2f08a4b\033]P3edc14e\033]P48fc0a9\033]P53aa6a0\033]P63d7ea6\033]P79fb3bf\033[H\033[2J\n'

# A fanlight, the window above a door: a half circle of panes. A digit is the colour of a pixel; a character is two
# pixels, one above the other.
awk '{
	if (NR % 2) { upper = $0; next }
	printf "  "
	for (at = 1; at <= length; at++)
		printf "\033[3%d;4%dm\342\226\200", substr(upper, at, 1), substr($0, at, 1)
	printf "\033[m\n"
}' >&3 << END
0000000000000000333333330000000000000000
0000000000002003333333333005000000000000
0000000000222203333333333055550000000000
0000000002222203333333333055555000000000
0000000222222200333333330055555550000000
0000002222222220333333330555555555000000
0000022222222220333333330555555555500000
0000222222222220033333300555555555550000
0000022222222222033333305555555555500000
0001000222222222033333305555555550006000
0011110022222222003333005555555500666600
0011111002222222200000055555555006666600
0111111100022220000000000555500066666660
0111111111002200444444440055006666666660
0111111111100004444444444000066666666660
0111111111110044444444444400666666666660
1111111111110444444444444440666666666666
1111111111100444444444444440066666666666
1111111111100444444444444440066666666666
1111111111100444444444444440066666666666
END

row=3
fact() { say "\033[$row;48H\033[1;33m$1\033[m\033[$row;60H$2"; row=$((row + 1)); }
say "\033[$row;48H\033[1;37mA Linux guest in Fanlight\033[m"
row=$((row + 1))
say "\033[$row;48H\033[34m-------------------------\033[m"
row=$((row + 1))
fact Kernel "$(uname -sr)"
fact CPUs "$(nproc)"
fact Memory "$(($(grep MemTotal /proc/meminfo | tr -dc 0-9) / 1024)) MiB"
fact Display "$(cat /sys/class/graphics/fb0/name), $(tr , x < /sys/class/graphics/fb0/virtual_size)"
fact Clock "$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
fact Devices "$(ls /sys/bus/virtio/devices | wc -l) by virtio"

say '\033[14;1H'
prompt() { say "  \033[1;35mguest\033[m:\033[1;36m~\033[m# $1"; }
lsvirtio() {
	for device in /sys/bus/virtio/devices/*; do
		driver=$(basename "$(readlink "$device/driver")")
		at=$(basename "$(readlink -f "$device/..")")
		what=$(cat "$device"/input/*/name 2> /dev/null)
		printf '%-9s %-14s %-14s %s\n' "$(basename "$device")" "$at" "$driver" "$what"
	done
}
run() { prompt "$1\n"; eval "$1" 2>&1 | sed 's/^ */  /' >&3; say '\n'; }
run lsvirtio
run "dmesg | grep -o 'Hypervisor detected: .*'"
run 'echo /dev/dri/* /dev/input/*'
prompt
sleep 1
echo "fanlight-demo: drawn"
read -r line
