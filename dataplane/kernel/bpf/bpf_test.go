package bpf

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// compiler is the one of which the committed objects are; another one makes others. gen.go
// and tests/run.sh, which installs it, go by its number.
const compiler = "clang version 14.0.6"

// TestObjectsComeFromTheSource compiles the program and compares.
func TestObjectsComeFromTheSource(t *testing.T) {
	out, err := exec.Command("clang-14", "--version").Output()
	if err != nil || !strings.Contains(string(out), compiler) {
		why := "needs " + compiler + " (Debian 12: apt-get install clang-14 llvm-14 libbpf-dev)"
		if os.Getenv("CI") != "" || strings.Contains(os.Getenv("WEFT_TEST_MUST"), "clang") {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	dir := t.TempDir()
	gen, err := os.ReadFile("gen.go")
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(gen), "//go:generate ")
	line, _, _ = strings.Cut(line, "\n")
	cmd := exec.Command("sh", "-c", strings.Replace(line, "bpf2go ", "bpf2go -output-dir "+dir+" ", 1))
	cmd.Env = append(os.Environ(), "GOPACKAGE=bpf")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	made, err := filepath.Glob(filepath.Join(dir, "program_*"))
	if err != nil || len(made) != 4 {
		t.Fatalf("made %v, %v", made, err)
	}
	for _, path := range made {
		want, _ := os.ReadFile(path)
		have, err := os.ReadFile(filepath.Base(path))
		if err != nil || !bytes.Equal(want, have) {
			t.Errorf("%s is not what the source makes (%v); run go generate ./dataplane/kernel/bpf, with libbpf-dev and linux-libc-dev of Debian 12", filepath.Base(path), err)
		}
	}
}
