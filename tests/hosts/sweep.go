package hosts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Sweep removes every lab whose process is dead.
func Sweep(ctx context.Context) error {
	names := map[string]bool{}
	for _, dir := range []string{root, "/run/netns"} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			if name, pid := labName(e.Name()); pid != 0 && !ownerAlive(name, pid) {
				names[name] = true
			}
		}
	}
	var errs []error
	for name := range names {
		errs = append(errs, removeLab(ctx, name))
	}
	return errors.Join(errs...)
}

// labName splits wl-<pid>-<n>[-<host>] into the lab's name and its owner. The
// pid is 0 where s is nothing of ours.
func labName(s string) (name string, pid int) {
	parts := strings.SplitN(s, "-", 4)
	if len(parts) < 3 || parts[0]+"-" != prefix {
		return "", 0
	}
	pid, err := strconv.Atoi(parts[1])
	if err != nil {
		return "", 0
	}
	if _, err := strconv.Atoi(parts[2]); err != nil {
		return "", 0
	}
	return strings.Join(parts[:3], "-"), pid
}

// writeOwner notes when this process started: a process id alone comes again.
func writeOwner(dir string) error {
	start, err := startTime(os.Getpid())
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "owner"), []byte(start), 0o644)
}

// covered are the folders outside the lab that dockerd and containerd write to;
// host.sh covers them, so they must exist.
func covered() []string { return []string{"/etc/docker", "/opt/containerd"} }

// makeCovered makes those that are missing and notes them in the lab's folder.
func makeCovered(dir string) error {
	var made []string
	for _, d := range covered() {
		if exists(d) {
			continue
		}
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
		made = append(made, d)
	}
	return os.WriteFile(filepath.Join(dir, "made"), []byte(strings.Join(made, "\n")), 0o644)
}

// removeCovered removes what makeCovered made, if nobody has used it since.
func removeCovered(dir string) {
	raw, _ := os.ReadFile(filepath.Join(dir, "made"))
	for _, d := range covered() {
		if slices.Contains(strings.Split(string(raw), "\n"), d) {
			_ = os.Remove(d)
		}
	}
}

func ownerAlive(name string, pid int) bool {
	start, err := startTime(pid)
	if err != nil {
		return false
	}
	want, err := os.ReadFile(filepath.Join(root, name, "owner"))
	// Not there, or empty: it is being written.
	return err != nil || len(want) == 0 || string(want) == start
}

// startTime returns field 22 of /proc/PID/stat, in clock ticks since boot.
func startTime(pid int) (string, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	// The second field, the command's name, may hold blanks and brackets.
	_, rest, _ := strings.Cut(string(raw[strings.LastIndexByte(string(raw), ')'):]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return "", fmt.Errorf("/proc/%d/stat: too few fields", pid)
	}
	return fields[19], nil
}

// removeLab removes everything that carries the lab's name: processes, network
// namespaces, cgroups, files. Mounts of a host vanish with its last process.
func removeLab(ctx context.Context, name string) error {
	spaces, err := filepath.Glob(filepath.Join("/run/netns", name+"-*"))
	if err != nil {
		return err
	}
	if err := killLab(ctx, name, spaces); err != nil {
		return err
	}
	var errs []error
	for _, s := range spaces {
		if _, err := run(ctx, nil, "ip", "netns", "del", filepath.Base(s)); err != nil && exists(s) {
			errs = append(errs, err)
		}
	}
	dir := filepath.Join(root, name)
	plugins, err := filepath.Glob(filepath.Join(dir, "*", "data/plugins", strings.Repeat("[0-9a-f]", 64)))
	if err != nil {
		return err
	}
	for _, r := range cgroupRoots() {
		errs = append(errs, removeCgroup(ctx, filepath.Join(r, name)))
		// Beside version 1, runc puts plugins at the root of the version 2 tree.
		for _, p := range plugins {
			errs = append(errs, removeCgroup(ctx, filepath.Join(r, filepath.Base(p))))
		}
	}
	if mounts, err := mountsUnder("self", dir); err != nil || len(mounts) > 0 {
		return errors.Join(append(errs, err, fmt.Errorf("lab %s: still mounted, left alone: %v", name, mounts))...)
	}
	removeCovered(dir)
	errs = append(errs, os.RemoveAll(dir))
	_ = os.Remove(root) // succeeds with the last lab
	return errors.Join(errs...)
}

// killLab kills the lab's processes until none is left: those in its cgroups
// (dockerd, containers, plugins) and those in its network namespaces.
func killLab(ctx context.Context, name string, spaces []string) error {
	inodes := map[uint64]bool{}
	for _, s := range spaces {
		if st, err := os.Stat(s); err == nil {
			inodes[st.Sys().(*syscall.Stat_t).Ino] = true
		}
	}
	return waitFor(ctx, 20*time.Millisecond, "processes of lab "+name+" to end", func() (bool, error) {
		pids, err := labProcesses(name, inodes)
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(pids) == 0, err
	})
}

func labProcesses(name string, netns map[uint64]bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		// A process may end while we look: errors mean that it is gone.
		if st, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil && netns[st.Sys().(*syscall.Stat_t).Ino] {
			pids = append(pids, pid)
			continue
		}
		raw, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if strings.Contains(string(raw), "/"+name+"/") && !isZombie(pid) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// isZombie says whether the process has ended and only waits for its parent.
func isZombie(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	i := strings.LastIndexByte(string(raw), ')')
	return i+2 < len(raw) && raw[i+2] == 'Z'
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
