package hosts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const cgroupMount = "/sys/fs/cgroup"

// cgroupRoots returns the roots of the machine's cgroup trees: one with version
// 2, one per controller with version 1.
func cgroupRoots() []string {
	if exists(filepath.Join(cgroupMount, "cgroup.controllers")) {
		return []string{cgroupMount}
	}
	procs, _ := filepath.Glob(filepath.Join(cgroupMount, "*", "cgroup.procs"))
	var roots []string
	for _, p := range procs {
		dir := filepath.Dir(p)
		// cpu,cpuacct and such are one tree under several names.
		if st, err := os.Lstat(dir); err == nil && st.IsDir() {
			roots = append(roots, dir)
		}
	}
	return roots
}

// makeCgroup makes the cgroup in every tree and returns the files that a process
// writes its id to. Path is relative to the roots.
func makeCgroup(path string) ([]string, error) {
	var files []string
	for _, r := range cgroupRoots() {
		dir := r
		for part := range strings.SplitSeq(path, "/") {
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, fmt.Errorf("cgroup: %w; the machine must let root make cgroups", err)
			}
			// A new cpuset of version 1 is empty and takes no process.
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				if raw, err := os.ReadFile(filepath.Join(filepath.Dir(dir), f)); err == nil && filepath.Base(r) == "cpuset" {
					if err := os.WriteFile(filepath.Join(dir, f), raw, 0o644); err != nil {
						return nil, err
					}
				}
			}
		}
		files = append(files, filepath.Join(dir, "cgroup.procs"))
	}
	return files, nil
}

// Confine puts a process of the host into a cgroup of its own, beside those that the
// engine makes for its plugins.
func (h *Host) Confine(pid int, name string) error {
	procs, err := makeCgroup(h.cgroup() + "/engine/" + name)
	for _, f := range procs {
		err = errors.Join(err, os.WriteFile(f, []byte(strconv.Itoa(pid)), 0o644))
	}
	return err
}

// removeCgroup removes a cgroup and those in it. The kernel needs a moment after
// the last process.
func removeCgroup(ctx context.Context, dir string) error {
	return waitFor(ctx, 20*time.Millisecond, "cgroup "+dir+" to be removed", func() (bool, error) {
		var dirs []string
		_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			_ = os.Remove(dirs[i])
		}
		return !exists(dir), nil
	})
}

// killCgroup kills the processes of a cgroup and of those in it.
func killCgroup(path string) error {
	for _, r := range cgroupRoots() {
		err := filepath.WalkDir(filepath.Join(r, path), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.Name() != "cgroup.procs" {
				return nil // it went away under us, or is another file
			}
			raw, _ := os.ReadFile(p)
			for _, f := range strings.Fields(string(raw)) {
				if pid, err := strconv.Atoi(f); err == nil {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
