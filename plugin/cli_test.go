package main

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
)

// TestCommands runs the commands of testdata/*.txtar against sockets that answer
// with the files of the same archive: "admin/…" is the plugin's, "docker/…"
// Docker's. A file named "$ weft …" holds what that command prints, and its exit
// status. -update writes it.
func TestCommands(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no testdata: %v", err)
	}
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) {
			archive, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			t.Setenv("WEFT_SOCKET", serveFiles(t, archive, "admin"))
			t.Setenv("DOCKER_HOST", "unix://"+serveFiles(t, archive, "docker"))
			changed := false
			for i, f := range archive.Files {
				args, ok := strings.CutPrefix(f.Name, "$ ")
				if !ok {
					continue
				}
				var out, errOut bytes.Buffer
				status := dispatch(t.Context(), strings.Fields(args), &out, &errOut)
				got := fmt.Sprintf("%s%s(exit status %d)\n", &out, &errOut, status)
				got = strings.ReplaceAll(got, os.Getenv("WEFT_SOCKET"), "ADMIN")
				got = strings.ReplaceAll(got, strings.TrimPrefix(os.Getenv("DOCKER_HOST"), "unix://"), "DOCKER")
				if *update {
					changed = changed || got != string(f.Data)
					archive.Files[i].Data = []byte(got)
				} else if diff := cmp.Diff(string(f.Data), got); diff != "" {
					t.Errorf("%s: -want +got\n%s", f.Name, diff)
				}
			}
			if changed {
				if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// serveFiles answers with the files below prefix, 404 for others. Without any,
// nobody listens.
func serveFiles(t *testing.T, archive *txtar.Archive, prefix string) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	files := map[string][]byte{}
	for _, f := range archive.Files {
		if name, ok := strings.CutPrefix(f.Name, prefix); ok {
			files[name] = f.Data
		}
	}
	if len(files) == 0 {
		return socket
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, ok := files[r.URL.RequestURI()]
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprintf(w, `{"error":"%s: not found","message":"%[1]s: no such thing"}`, r.URL.RequestURI())
			return
		}
		_, _ = w.Write(body)
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
	return socket
}

func TestArgumentsOfDockersCommandLine(t *testing.T) {
	for _, c := range []struct{ argv, want string }{
		{"weft status -o json", "status -o json"},
		{"/usr/libexec/docker/cli-plugins/docker-weft weft status", "status"},
		{"docker-weft --context x weft audit --settle 5s", "audit --settle 5s"},
		{"docker-weft docker-cli-plugin-metadata", "docker-cli-plugin-metadata"},
		{"docker-weft weft", ""},
		{"weft weft status", "status"},
		{"weft", ""},
	} {
		if got := strings.Join(verbArgs(strings.Fields(c.argv)), " "); got != c.want {
			t.Errorf("%s: got %q, want %q", c.argv, got, c.want)
		}
	}
}

func TestMetadata(t *testing.T) {
	var out bytes.Buffer
	if status := dispatch(t.Context(), []string{"docker-weft", "docker-cli-plugin-metadata"}, &out, &out); status != exitFine {
		t.Errorf("status %d", status)
	}
	for _, part := range []string{`"SchemaVersion":"0.1.0"`, `"Vendor":"Weft"`, `"Version":"`, `"ShortDescription":"`} {
		if !strings.Contains(out.String(), part) {
			t.Errorf("%s is not in %s", part, &out)
		}
	}
}

func TestOneOfSeveralPluginsMustBeChosen(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"dead", "a", "b"} {
		path := filepath.Join(dir, name, adminSocket)
		l, err := listenUnix(path)
		if err != nil {
			t.Fatal(err)
		}
		if name == "dead" {
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			l.Close()
		} else {
			t.Cleanup(func() { l.Close() })
		}
	}
	found, err := findSockets(dir)
	want := []string{filepath.Join(dir, "a", adminSocket), filepath.Join(dir, "b", adminSocket)}
	if diff := cmp.Diff(want, found); err != nil || diff != "" {
		t.Errorf("%v, -want +got\n%s", err, diff)
	}
}

func TestInstall(t *testing.T) {
	dir := t.TempDir()
	bin, plugins := filepath.Join(dir, "bin"), filepath.Join(dir, "cli")
	var out, errOut bytes.Buffer
	argv := []string{"weft", "install", "--bin-dir", bin, "--cli-plugin-dir", plugins}
	for range 2 { // again over itself
		if status := dispatch(t.Context(), argv, &out, &errOut); status != exitFine {
			t.Fatalf("status %d: %s", status, &errOut)
		}
	}
	if st, err := os.Stat(filepath.Join(bin, "weft")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("mode %v, %v; want 0755", st, err)
	}
	if to, err := os.Readlink(filepath.Join(plugins, "docker-weft")); err != nil || to != filepath.Join(bin, "weft") {
		t.Errorf("link leads to %q, %v", to, err)
	}
	if left, _ := filepath.Glob(filepath.Join(bin, "*.new")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	// What is not a link of ours stays.
	file := filepath.Join(plugins, "docker-weft")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if status := dispatch(t.Context(), argv, &out, &errOut); status != exitProblem || !strings.Contains(errOut.String(), "is not a link; remove it first") {
		t.Errorf("status %d: %s", status, &errOut)
	}
}
