package main

import (
	"bytes"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
)

// An address of an attachable network that the leader's plugin was not told to release.
func TestLeakedAddressOfAnAttachableNetwork(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/swarm-newest.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range archive.Files {
		if strings.Contains(f.Name, "attachment") {
			archive.Files[i].Data = bytes.ReplaceAll(f.Data, []byte("10.91.0.142/24"), nil)
		}
	}
	t.Setenv("WEFT_SOCKET", serveFiles(t, archive, "admin"))
	t.Setenv("DOCKER_HOST", "unix://"+serveFiles(t, archive, "docker"))
	var out bytes.Buffer
	const want = "Docker, leases: network ours: address 10.91.0.142 is leased (auto, since 2026-11-25 17:27:45 UTC), but nothing in Docker has it; restart dockerd here to have it back\n1 differences\n"
	if status := dispatch(t.Context(), []string{"weft", "audit"}, &out, &out); status != exitProblem || out.String() != want {
		t.Errorf("status %d, got\n%swant\n%s", status, &out, want)
	}
}
