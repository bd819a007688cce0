package main

import (
	"bytes"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"
)

// Addresses of an attachable network that the leader's plugin was not told to release;
// one of them this host has from when it led before.
func TestLeakedAddressOfAnAttachableNetwork(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/swarm-newest.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for i, f := range archive.Files {
		if strings.Contains(f.Name, "attachment") {
			archive.Files[i].Data = []byte("[]")
		}
		archive.Files[i].Data = bytes.Replace(archive.Files[i].Data, []byte(`"WeftGlobal/10.91.0.0/24","address":"10.91.0.142",`),
			[]byte(`"WeftGlobal/10.91.0.0/24","address":"10.91.0.142","doubt":"2026-11-25T17:28:00Z",`), 1)
	}
	t.Setenv("WEFT_SOCKET", serveFiles(t, archive, "admin"))
	t.Setenv("DOCKER_HOST", "unix://"+serveFiles(t, archive, "docker"))
	var out bytes.Buffer
	const want = "Docker, leases: network ours: address 10.91.0.141 is leased (auto, since 2026-11-25 17:27:43 UTC), but nothing in Docker has it; restart dockerd here to have it back\n" +
		"Docker, leases: network ours: address 10.91.0.142 is leased (auto, since 2026-11-25 17:27:45 UTC), but nothing in Docker has it; it is freed if that stays so for ten minutes\n2 differences\n"
	if status := dispatch(t.Context(), []string{"weft", "audit"}, &out, &out); status != exitProblem || out.String() != want {
		t.Errorf("status %d, got\n%swant\n%s", status, &out, want)
	}
}
